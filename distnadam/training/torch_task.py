"""A task that trains a torch module: its parameters in, its gradients out, as NumPy arrays."""

import contextlib
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from distnadam.errors import TrainingError
from distnadam.extras import how_to_install
from distnadam.training.task_checks import fingerprint

Array = NDArray[Any]
_drawing = threading.RLock()
"""Held by whoever draws from torch's generators, which ranks that are threads share."""
_MOST_SEEDING_BYTES = 4096


def import_torch(task: str) -> Any:
    """Return torch; raise TrainingError, naming the task, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise TrainingError(f"the task {task} needs torch: {how_to_install('torch')}") from error
    return torch


class TorchTask(ABC):
    """A task for `fit` and ``distnadam train``, of a module, a loss and batches.

    Parameters that need no gradient stay as `make_module` made them. What the loss draws from
    torch's generators, as dropout does, is seeded by the batch and the parameters, so that a
    repeated step draws the same. Buffers that the module's `state_dict` has, such as BatchNorm's
    averages, are the task's own state (`Task` says what becomes of it), unless a subclass has
    `state` and `load_state`.

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
        self._draws = True  # until the first step shows
        if self._buffers() and not any(hasattr(self, each) for each in ("state", "load_state")):
            # only then: a rank of a task without state recovers alone
            self.state, self.load_state = self._state, self._load_state
        return {name: _array_of(p).copy() for name, p in self._parameters()}

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, dict[str, Array]]:
        """Return the loss of a batch and its gradients by name; zeros where the loss has none."""
        self._set(params)
        self.module.zero_grad(set_to_none=True)
        torch = self._torch()
        device = self._device(torch)
        with (
            self._seeded(torch, device, params, batch) if self._draws else contextlib.nullcontext()
        ):
            loss = self.loss_of(self.module, _moved(batch, device, torch.Tensor))
            _check_loss(loss, torch.Tensor)
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

    @contextlib.contextmanager
    def _seeded(self, torch: Any, device: str, params: Any, batch: Any) -> Iterator[None]:
        """Seed torch's generators for a step, and see whether it draws; leave them as they were."""
        cuda = [torch.device(device)] if device.startswith("cuda") else []
        with _drawing, torch.random.fork_rng(devices=cuda):
            torch.manual_seed(_seed_of(self.seed, params, batch))
            before = _generators(torch, cuda)
            yield
            after = _generators(torch, cuda)
            self._draws = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))

    def _state(self) -> dict[str, Any]:
        return {name: buffer.detach().clone() for name, buffer in self._buffers().items()}

    def _load_state(self, state: dict[str, Any]) -> None:
        torch = self._torch()
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                array = np.array(state[name])
                known = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16
                buffer.copy_(torch.from_numpy(known))

    def _buffers(self) -> dict[str, Any]:
        """Return the buffers that `state_dict` has, by name."""
        saved = self.module.state_dict()
        return {name: each for name, each in self.module.named_buffers() if name in saved}

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


def _check_loss(loss: Any, tensor: type) -> None:
    """Raise TrainingError unless a loss is what `loss_of` says."""
    if not isinstance(loss, tensor):
        got = f"got {type(loss).__name__}: leave out .item() and the like"
    elif (shape := tuple(loss.shape)) and loss.numel() != 1:  # type: ignore[attr-defined]
        got = f"got one of shape {shape}: take its mean"
    elif not loss.requires_grad:  # type: ignore[attr-defined]
        got = "got one that no parameter takes part in: look for .detach() and torch.no_grad()"
    else:
        return
    raise TrainingError(f"loss_of: expected a tensor of one element to call backward() on, {got}")


def _generators(torch: Any, cuda: list[Any]) -> list[Any]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]


def _seed_of(seed: int, params: Any, batch: Any) -> int:
    """Return a seed for a step: of its batch and, for one that comes again, of some parameters."""
    last = np.ascontiguousarray([*params.values()][-1]).reshape(-1).view(np.uint8)
    plain = (bool, int, float, str, bytes, tuple, type(None))  # of others no two processes agree
    found = [(path, leaf) for path, leaf in fingerprint(batch).items() if isinstance(leaf, plain)]
    digest = xxhash.xxh3_64(repr((seed, found)).encode())
    digest.update(last[:_MOST_SEEDING_BYTES].tobytes())
    return digest.intdigest()


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
