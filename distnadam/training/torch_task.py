"""A task that trains a torch module: its parameters in, its gradients out, as NumPy arrays."""

import sys
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnadam.errors import TrainingError
from distnadam.extras import how_to_install

Array = NDArray[Any]


def import_torch(task: str) -> Any:
    """Return torch; raise TrainingError, naming the task, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise TrainingError(f"the task {task} needs torch: {how_to_install('torch')}") from error
    return torch


class TorchTask(ABC):
    """A task for `fit` and ``distnadam train``, of a module, a loss and batches.

    Parameters that need no gradient stay as `make_module` made them. What the loss draws at random
    (dropout) should come from the batch, or a repeated step has other gradients.

    Attributes:
        device: where the module and the tensors of its batches go. None is the GPU of a worker that
            has one (`Options(worker_gpus=1)`), and the CPU elsewhere.
        module: the module, once `init` was called; its parameters are the last that were given.
        seed: what `init` was given.

    >>> import torch
    >>> class Line(TorchTask):
    ...     def make_module(self):
    ...         return torch.nn.Linear(4, 1)
    ...     def batch(self, step, rank, world_size):
    ...         generator = torch.Generator().manual_seed(1000 * step + rank)
    ...         return torch.randn(32, 4, generator=generator)
    ...     def loss_of(self, module, inputs):
    ...         return (module(inputs)[:, 0] - inputs.sum(1)).square().mean()
    ...     def metrics_of(self, module):
    ...         return {"weight": module.weight.mean().item()}
    >>> optimizer = DistNadam(lr=0.05)
    >>> history = fit(Line(), steps=200, optimizer=optimizer, backend="local", verbose=False)
    >>> round(history.metrics["weight"], 1)
    1.0
    """

    device: str | None = None
    module: Any
    seed: int

    @abstractmethod
    def make_module(self) -> Any:
        """Return the module; torch's generator has been seeded with the run's seed."""

    @abstractmethod
    def batch(self, step: int, rank: int, world_size: int) -> Any:
        """Return a rank's part of the batch of a step; the same whenever it is asked."""

    @abstractmethod
    def loss_of(self, module: Any, batch: Any) -> Any:
        """Return the mean loss of a batch, a tensor of one element."""

    @abstractmethod
    def metrics_of(self, module: Any) -> dict[str, float]:
        """Return what an evaluation reports, by name; gradients are off, and `eval` is on.

        What the module is fed goes to its device first, as batches have.
        """

    def init(self, seed: int) -> dict[str, Array]:
        """Make the module, and return its parameters by torch's names."""
        torch = self._torch()
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = self.make_module()
        return {name: _array_of(p).copy() for name, p in self._parameters()}

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, dict[str, Array]]:
        """Return the loss of a batch and its gradients by name; zeros where the loss has none."""
        self._set(params)
        self.module.zero_grad(set_to_none=True)
        torch = self._torch()
        loss = self.loss_of(self.module, _moved(batch, self._device(torch), torch.Tensor))
        loss.backward()
        return loss.item(), {
            name: _array_of(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in self._parameters()
        }

    def evaluate(self, params: Any) -> dict[str, float]:
        """Return `metrics_of` the module with these parameters."""
        torch = self._torch()
        self._set(params)
        was_training = self.module.training
        try:
            with torch.no_grad():
                return self.metrics_of(self.module.eval())
        finally:
            self.module.train(was_training)

    def _torch(self) -> Any:
        return import_torch(getattr(self, "name", type(self).__name__))

    def _device(self, torch: Any) -> str:
        if self.device is not None:
            return self.device
        ray = sys.modules.get("ray")
        given = ray is not None and ray.is_initialized() and ray.get_gpu_ids()
        return "cuda" if given and torch.cuda.is_available() else "cpu"

    def _set(self, params: Any) -> None:
        torch = self._torch()
        self.module.to(self._device(torch))  # here, so that a task is sent to others without one
        for name, parameter in self._parameters():
            if parameter.device.type == "cpu":
                np.copyto(_array_of(parameter), params[name])
            else:
                parameter.detach().copy_(torch.tensor(params[name]))

    def _parameters(self) -> list[tuple[str, Any]]:
        named = self.module.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def _array_of(tensor: Any) -> Array:
    """Return a tensor's elements: its own memory where it is on the CPU."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def _moved(batch: Any, device: str, tensor: type) -> Any:
    """Return a batch with its tensors, in tuples, lists and dicts too, on a device."""
    if isinstance(batch, tensor):
        return batch.to(device)  # type: ignore[attr-defined]
    if isinstance(batch, dict):
        return {key: _moved(value, device, tensor) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_moved(value, device, tensor) for value in batch)
    return batch
