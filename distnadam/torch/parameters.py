"""The model's own tensors, and which of them were changed since the shards' last values were
written into them. No shards.

What a step has left in a tensor is compared bit by bit, since torch counts no write through
`.data`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch.autograd.graph import increment_version

from distnadam.errors import StructureError
from distnadam.torch.arrays import as_torch, bits_of, digest_bytes, digest_of

_SHOWN = 4


class Parameters:
    """Tensors by name, updated in place.

    Args:
        names: one for each tensor.
        tensors: the model's, each once.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        self._trees: list[_Handed] = []
        self._handed: _Handed | None = None
        self._places: list[int] = []
        self._is_plain = False
        self._kinds = [(tensor.dtype, tensor.nbytes) for tensor in tensors]
        self._sizes = [tensor.nbytes for tensor in tensors]

    def as_tree(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, as `build` takes them."""
        return {
            name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)
        }

    def changed(self) -> list[int]:
        """Return the tensors whose bits are not those that the last `take` has left.

        Raises:
            StructureError: a tensor has another shape or dtype now.
        """
        handed = self._handed
        if handed is None:
            return []
        self._look_at()
        if not self._is_plain:
            bits = zip(self.tensors, handed.values, strict=True)
            return [i for i, (t, h) in enumerate(bits) if not torch.equal(bits_of(t), bits_of(h))]
        compared = zip(self._places, handed.places, self._sizes, strict=True)
        return [i for i, (one, other, size) in enumerate(compared) if _memcmp(one, other, size)]

    def in_words(self, changed: Sequence[int]) -> str:
        """Return changed tensors by name, each with a digest of its bits, for the other ranks."""
        each = [f"{self.names[i]!r} ({digest_of(self.tensors[i])})" for i in changed]
        shown = ", ".join(each[:_SHOWN])
        if len(each) <= _SHOWN:
            return shown
        rest = digest_bytes("".join(each[_SHOWN:]).encode())
        return f"{shown} and {len(each) - _SHOWN} more ({rest})"

    def take(self, tree: dict[str, Any]) -> None:
        """Write the shards' parameters into the tensors, in place.

        Args:
            tree: by name; the arrays must stay as they are until the next call.
        """
        handed = self._handed = self._of(tree)
        with torch.no_grad():
            self._look_at()
            if not self._is_plain:
                torch._foreach_copy_(self.tensors, handed.values)
                return
            for place, source, size in zip(self._places, handed.places, self._sizes, strict=True):
                _memmove(place, source, size)
            increment_version(self.tensors)

    def hand_out(self, tree: dict[str, Any]) -> None:
        """Take the shards' parameters to be what the tensors hold already."""
        self._handed = self._of(tree)

    def _of(self, tree: dict[str, Any]) -> "_Handed":
        """Return a tree as tensors in order; a worker alternates between two."""
        arrays = [tree[name] for name in self.names]
        for known in self._trees:
            if all(map(is_, known.arrays, arrays)):
                return known
        values = [
            as_torch(array).to(tensor.device, tensor.dtype)
            for array, tensor in zip(arrays, self.tensors, strict=True)
        ]
        handed = _Handed(arrays, values, [value.data_ptr() for value in values])
        if all(tensor.device.type == "cpu" for tensor in self.tensors):
            self._trees = [*self._trees[-1:], handed]
        return handed

    def _look_at(self) -> None:
        """Learn where the tensors lie, which `.data = ` and `module.to` may change.

        Where each is one stretch of this process's memory, bytes are compared and moved by this
        thread alone: torch would wait for others of its own, which on a host that is busy with
        ranks and shards takes longer than the work.

        Raises:
            StructureError: one has another shape or dtype now.
        """
        kinds = [(tensor.dtype, tensor.nbytes) for tensor in self.tensors]
        if kinds != self._kinds:
            index = next(i for i, kind in enumerate(kinds) if kind != self._kinds[i])
            now, before = kinds[index], self._kinds[index]
            raise StructureError(
                f"{self.names[index]!r} has {now[1]} bytes of {now[0]} now, and had {before[1]} of "
                f"{before[0]} when the shards were built: convert the model before the first step"
            )
        self._places = [tensor.data_ptr() for tensor in self.tensors]
        self._is_plain = all(
            tensor.is_contiguous() and tensor.is_cpu and (place or not tensor.numel())
            for tensor, place in zip(self.tensors, self._places, strict=True)
        )


@dataclass(frozen=True)
class _Handed:
    """A worker's parameters in order: its arrays, the same as tensors, and where these lie."""

    arrays: list[Any]
    values: list[torch.Tensor]
    places: list[int]


_libc = ctypes.CDLL(None)
_memcmp, _memmove = _libc.memcmp, _libc.memmove
_memcmp.argtypes = _memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = ctypes.c_void_p
