"""A model that torch's DistributedDataParallel wraps as well: gradients would be averaged twice,
once by its all-reduce for nothing. Its all-reduce can be switched off, else it is refused.
"""

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch

from distnadam.errors import LifecycleError


def find_wrapper(tensors: Iterable[torch.Tensor]) -> Any | None:
    """Return the DistributedDataParallel that wraps a model with one of these tensors; None if none
    does.

    An optimizer sees tensors and no module, so all objects are looked through: call it once.
    """
    module = sys.modules.get("torch.nn.parallel.distributed")
    if module is None or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized():
        return None
    wanted = {id(tensor) for tensor in tensors}
    for each in gc.get_objects():
        if issubclass(type(each), module.DistributedDataParallel) and any(
            id(parameter) in wanted for parameter in each.parameters()
        ):
            return each
    return None


def require_no_all_reduce(wrapper: Any) -> None:
    """Raise LifecycleError unless a wrapper's gradients stay this rank's own."""
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

    hooks = [hook for hook, _ in getattr(wrapper, "_comm_hooks", ())]
    if noop_hook not in hooks:
        raise LifecycleError(
            "the model is wrapped in DistributedDataParallel, whose all-reduce averages gradients "
            "that this optimizer averages too: give the model as it is, or switch it off before "
            "the first backward pass: `from torch.distributed.algorithms.ddp_comm_hooks."
            "debugging_hooks import noop_hook; model.register_comm_hook(None, noop_hook)`"
        )
