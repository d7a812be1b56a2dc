"""NumPy's memory as torch's tensors and back, without a copy. Nothing of optimizers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distnadam.errors import StructureError
from distnadam.frontends.changes import digest_bytes
from distnadam.tensors.arrays import BFLOAT16, Array
from distnadam.tensors.leaves import as_numpy

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers in which a number of that many bytes is compared bit by bit."""


class _Memory:
    """An array's memory, also where NumPy says that it is read-only, of which torch would warn."""

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._array = array  # keeps the memory


def as_torch(array: Any) -> torch.Tensor:
    """Return a tensor over an array's memory, which must not be written if the array's must not; a
    NumPy scalar's is its own.
    """
    if not isinstance(array, np.ndarray):
        array = np.array(array)
    is_bfloat16 = array.dtype == BFLOAT16
    if is_bfloat16:
        array = array.view(np.int16)
    if not array.flags.writeable:
        array = np.asarray(_Memory(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def as_array(tensor: torch.Tensor) -> Array:
    """Return a tensor's numbers, without a copy where its memory allows."""
    return as_numpy(tensor.detach())


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers as integers, a view unless torch has it negated (`is_neg`)."""
    return tensor.detach().resolve_neg().view(BITS[tensor.element_size()])


def require_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise StructureError for a tensor whose storage was freed or made too short for it, of which
    torch reads on until the process ends.
    """
    if not tensor.numel():
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = tensor.storage_offset() + 1 + sum((size - 1) * stride for size, stride in steps)
    held, needed = tensor.untyped_storage().nbytes(), length * tensor.element_size()
    if held < needed:
        raise StructureError(
            f"{name!r} has a storage of {held} bytes and needs {needed}: it was freed, as by "
            "untyped_storage().resize_(0); give the tensor memory before the step"
        )


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors into others, together unless torch has one of those negated (`is_neg`)."""
    if not any(map(torch.Tensor.is_neg, targets)):
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def digest_of(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's bits in a few letters."""
    return digest_bytes(np.ascontiguousarray(as_array(tensor)).tobytes())
