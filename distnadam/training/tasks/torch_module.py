"""What tasks on a torch module share: parameters in and gradients out, as NumPy arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnadam.errors import TrainingError

Array = NDArray[Any]


def import_torch(task: str) -> Any:
    """Return torch; raise TrainingError, naming the task, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise TrainingError(
            f"the task {task} needs torch: pip install 'distnadam[torch]'"
        ) from error
    return torch


def parameters_of(module: Any) -> dict[str, Array]:
    """Return copies of a module's parameters by name."""
    return {name: np.array(p.detach().numpy()) for name, p in module.named_parameters()}


def set_parameters(module: Any, params: dict[str, Array]) -> None:
    """Copy arrays into a module's parameters."""
    for name, parameter in module.named_parameters():
        np.copyto(parameter.detach().numpy(), params[name])


def loss_and_gradients_of(
    module: Any, params: dict[str, Array], loss_of: Callable[[Any], Any]
) -> tuple[float, dict[str, Array]]:
    """Return the loss of a module with these parameters, and its gradients by name."""
    set_parameters(module, params)
    module.zero_grad(set_to_none=True)
    loss = loss_of(module)
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in module.named_parameters()}
