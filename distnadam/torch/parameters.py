"""The model's own tensors, and which of them were changed since the shards' last values were
written into them. No shards.

A tensor may lie in the memory of this process's shards: then it is what they step, and a change of
it is theirs already. What a step has left in any other is compared bit by bit, since torch counts
no write through `.data`.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from distnadam.errors import StructureError
from distnadam.frontends.changes import in_words
from distnadam.tensors.arrays import Array
from distnadam.tensors.leaves import not_finite
from distnadam.torch.arrays import as_array, as_torch, bits_of, copy_all, digest_of, require_memory
from distnadam.torch.device_copies import HandedOut, PinnedMemory, device_of


class Parameters:
    """Tensors by name, updated in place.

    Args:
        names: one for each tensor.
        tensors: the model's, each once.
        pinned: memory that is registered with a device's driver.
    """

    def __init__(
        self,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        pinned: PinnedMemory | None = None,
    ) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        self._pinned = PinnedMemory() if pinned is None else pinned
        self._device: torch.device | None = None
        self._on_device: HandedOut | None = None
        self._trees: list[_Handed] = []
        self._handed: _Handed | None = None
        self._own = [_has_own_memory(tensor) for tensor in tensors]  # before NumPy has looked
        self._moved: list[torch.Tensor] = []  # those that lie in the shards' memory
        self._slots: list[torch.Tensor] = []  # where each of them does
        self._slot_places: list[int] = []
        self._writes = 0  # into those in place, as torch had counted them after the last step
        self._copied = list(range(len(self.tensors)))  # all others
        self._kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self._sizes = [tensor.nbytes for tensor in tensors]
        self._places: list[int] = []  # of those
        self._is_plain = False

    def as_tree(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, as `build` takes them."""
        return {
            name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)
        }

    def move_in(self, memory: Sequence[Array]) -> None:
        """Have the tensors that can lie where the shards have handed out their values, and are
        stepped there; the others are compared and copied.

        Args:
            memory: that of the parameters, where the shards expect others to write it.
        """
        handed, self._copied = self._handed, []
        assert handed is not None
        each = zip(self.tensors, handed.arrays, handed.values, strict=True)
        for index, (tensor, array, slot) in enumerate(each):
            is_there = any(np.may_share_memory(array, flat) for flat in memory)  # no cast of it
            if is_there and self._own[index] and _fits(tensor, slot):
                tensor.data = slot
                self._moved.append(tensor)
                self._slots.append(slot)
                self._slot_places.append(slot.data_ptr())
            else:
                self._copied.append(index)
        self._writes = self._count_writes()

    def require_finite(self) -> None:
        """Raise StructureError if a tensor in the shards' memory was written since the last step,
        as far as torch counts writes (none through `.data`), and is not finite: it is refused where
        others are given to the shards.
        """
        writes = self._count_writes()
        if writes == self._writes:
            return
        copied = set(self._copied)
        for index, (name, tensor) in enumerate(zip(self.names, self.tensors, strict=True)):
            if index not in copied and not torch.isfinite(tensor).all():
                raise not_finite(name, as_array(tensor))
        self._writes = writes

    def _count_writes(self) -> int:
        return sum(map(_version, self._moved))

    def have_left(self) -> bool:
        """Return whether a tensor that lay in the shards' memory was given other memory (by
        `.data = `, `share_memory_`), and somebody else has either of the two; one that nobody has
        is moved back.

        Raises:
            StructureError: a tensor's storage was freed; nothing was changed.
        """
        are_there = list(map(_data_ptr, self._slots)) == self._slot_places  # also in shared memory
        is_same = are_there and all(map(_is_set_to, self._moved, self._slots))
        if is_same and not any(map(_is_neg, self._moved)):
            return False
        for name, tensor in zip(self.names, self.tensors, strict=True):
            require_memory(name, tensor)
        for tensor, slot in zip(self._moved, self._slots, strict=True):
            if are_there and _is_set_to(tensor, slot) and not tensor.is_neg():
                continue
            is_free = are_there and _num_users(slot) == 1
            if not (is_free and _has_own_memory(tensor) and _fits(tensor, slot)):
                self._moved, self._slots, self._slot_places = [], [], []
                self._copied = list(range(len(self.tensors)))
                return True
            slot.copy_(tensor.detach())
            tensor.data = slot
            self._writes = -1  # it was not counted
        return False

    def changed(self) -> list[int]:
        """Return the tensors whose bits are not those that the last `take` has left.

        Raises:
            StructureError: a tensor has another shape or dtype now, or its storage was freed.
        """
        if self._handed is None or not self._copied:
            return []  # what lies in the shards' memory is theirs already
        self._look_at()
        if self._on_device is not None:
            return self._on_device.changed(self.tensors)
        handed = self._handed
        if not (self._is_plain and handed.is_plain):
            values = [handed.values[i].to(self.tensors[i]) for i in self._copied]
            return [
                i
                for i, value in zip(self._copied, values, strict=True)
                if not torch.equal(bits_of(self.tensors[i]), bits_of(value))
            ]
        places, sizes = handed.places, self._sizes
        compared = zip(self._copied, self._places, strict=True)
        return [i for i, place in compared if _memcmp(place, places[i], sizes[i])]

    def forget(self) -> None:
        """Take none to be changed until values are handed out or taken again."""
        self._handed = None

    def in_words(self, changed: Sequence[int]) -> str:
        """Return changed tensors by name, each with a digest of its bits, for the other ranks."""
        return in_words([(self.names[i], digest_of(self.tensors[i])) for i in changed])

    def take(self, tree: dict[str, Any]) -> None:
        """Write the shards' parameters into the tensors, in place, which lie where `changed` or
        `hand_out` has last seen them.

        Args:
            tree: by name; the arrays must stay as they are until the next call.
        """
        if self._copied:
            with torch.no_grad():
                self._copy([tree[name] for name in self.names])
        increment_version(self.tensors)
        self._writes += len(self._moved)

    def _copy(self, arrays: list[Any]) -> None:
        handed = self._handed = self._of(arrays)
        if self._on_device is not None:
            self._on_device.take(handed.copies, self.tensors)
        elif self._is_plain and handed.is_plain:
            for i, place in zip(self._copied, self._places, strict=True):
                _memmove(place, handed.places[i], self._sizes[i])
        else:
            sources = [handed.values[i] for i in self._copied]
            copy_all([self.tensors[i] for i in self._copied], sources)

    def hand_out(self, tree: dict[str, Any]) -> None:
        """Take the shards' parameters to be what the tensors hold already."""
        self._look_at()
        self._hand_out([tree[name] for name in self.names])

    def _hand_out(self, arrays: list[Any]) -> None:
        self._handed = self._of(arrays)
        if self._on_device is not None:
            self._on_device.take(self._handed.copies)

    def _of(self, arrays: list[Any]) -> "_Handed":
        """Return a tree's arrays as tensors in order; a worker alternates between two."""
        version = self._pinned.version
        for known in self._trees:
            if known.version == version and all(map(is_, known.arrays, arrays)):
                return known
        if self._device is not None:
            plain = [np.asarray(array) for array in arrays]
            if self._on_device is None:
                self._on_device = HandedOut(self.tensors, plain)
            copies = self._on_device.copies(plain, self._pinned)
            handed = _Handed(arrays, [], [], version, copies)
            self._trees = [*self._trees[-1:], handed]
            return handed
        values = [
            as_torch(array).to(tensor.device)  # not in its dtype: a copy would stay as it is
            for array, tensor in zip(arrays, self.tensors, strict=True)
        ]
        is_plain = all(v.dtype == t.dtype for v, t in zip(values, self.tensors, strict=True))
        places = [value.data_ptr() for value in values]
        handed = _Handed(arrays, values, places, version, is_plain=is_plain)
        if all(tensor.device.type == "cpu" for tensor in self.tensors):
            self._trees = [*self._trees[-1:], handed]
        return handed

    def _look_at(self) -> None:
        """Learn where the tensors lie that are copied, which `.data = ` and `module.to` may change.

        Where each is one stretch of this process's memory, bytes are compared and moved by this
        thread alone: torch would wait for others of its own, which on a host that is busy with
        ranks and shards takes longer than the work.

        Raises:
            StructureError: one has another shape or dtype now, or its storage was freed.
        """
        tensors = [self.tensors[i] for i in self._copied]
        kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        expected = [self._kinds[i] for i in self._copied]
        if kinds != expected:
            which = next(i for i, kind in enumerate(kinds) if kind != expected[i])
            now, before, index = kinds[which], expected[which], self._copied[which]
            raise StructureError(
                f"{self.names[index]!r} is {now[0]} of shape {tuple(now[1])} now, and was "
                f"{before[0]} of shape {tuple(before[1])} when the shards were built: convert the "
                "model before the first step"
            )
        places = [tensor.data_ptr() for tensor in tensors]
        if places != self._places:
            for index, tensor in zip(self._copied, tensors, strict=True):
                require_memory(self.names[index], tensor)
        if (device := device_of(self.tensors)) != self._device:
            self._device, self._on_device, self._trees = device, None, []
            if self._handed is not None:
                self._hand_out(self._handed.arrays)
        self._places = places
        self._is_plain = all(
            tensor.is_contiguous()
            and tensor.is_cpu
            and not tensor.is_neg()  # its memory holds other numbers
            and (place or not tensor.numel())
            for tensor, place in zip(tensors, self._places, strict=True)
        )


@dataclass(frozen=True)
class _Handed:
    """A worker's parameters in order: its arrays, the same as tensors, where these lie, and whether
    all are in the model's dtypes; or what is copied to a device."""

    arrays: list[Any]
    values: list[torch.Tensor]
    places: list[int]
    version: int
    copies: Sequence[Any] = ()
    is_plain: bool = True


def _has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether nobody but a tensor has its memory, and would see no more changes if it moved.

    Memory of NumPy's, of a file or of several processes cannot be resized, nor what `.numpy()` was
    ever taken of.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if _storage_references(tensor) > _ALONE:
        return False
    storage = tensor.untyped_storage()
    return (
        storage.nbytes() == tensor.nbytes > 0
        and storage.resizable()
        and not storage.is_shared()
        and _num_users(tensor) == 1
    )


def _fits(tensor: torch.Tensor, slot: torch.Tensor) -> bool:
    """Whether a tensor can lie in a slot: it is as aligned as torch's own memory, since the bits of
    a product of matrices depend on that.
    """
    kinds = ((each.device, each.dtype, each.shape, each.stride()) for each in (tensor, slot))
    return slot.data_ptr() % _ALIGNED == 0 and next(kinds) == next(kinds)


def _storage_references(tensor: torch.Tensor) -> int:
    """Return how many references there are to Python's object of a tensor's storage."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


def _num_users(tensor: torch.Tensor) -> int:
    """Return how many tensors have the memory of one, whatever graph or array keeps them."""
    storage = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1  # the storage of here


_version = attrgetter("_version")
_data_ptr, _is_set_to, _is_neg = torch.Tensor.data_ptr, torch.Tensor.is_set_to, torch.Tensor.is_neg
_ALONE = _storage_references(torch.empty(1))
_ALIGNED = 64
"""Bytes to a multiple of which torch aligns memory."""
_libc = ctypes.CDLL(None)
_memcmp, _memmove = _libc.memcmp, _libc.memmove
_memcmp.argtypes = _memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = ctypes.c_void_p
