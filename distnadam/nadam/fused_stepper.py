"""The step as one compiled loop over memory, called on the arrays' addresses.

Gradients of half precision are widened before, piece by piece.
"""

import ctypes
import weakref
from collections.abc import Sequence
from operator import call, is_not
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from distnadam.nadam.fused import load_loop
from distnadam.nadam.fused_abi import CONSTANTS
from distnadam.nadam.step_scalars import NONE
from distnadam.nadam.stepper import Part, RangeStep, Slots, Stepper, check_denormals
from distnadam.tensors.arrays import Array, own_errors
from distnadam.tensors.pieces import Pieces, stretches

WIDENED = 65536
"""Elements of half precision that are widened at a time before the loop takes them."""
STREAMED_BYTES = 4 * 1024 * 1024
"""Bytes of a parameter array from which on new parameters, written into another, are stored past
the caches, where they would displace what is still needed.
"""
_MOST_CALLS = 8
"""Calls of the loop that are kept for later steps: a thread has two, or three once it has stepped
in place, twice as many where it clips by norm, and a standby's every step is new.
"""


class _Call(NamedTuple):
    """The loop's arguments for parts of slots; it keeps these two, whose identities name it."""

    slots: Slots
    parts: Sequence[Part]
    arguments: tuple[Any, ...]


class FusedStepper(Stepper):
    """The step as one compiled loop; needs llvmlite where no loop is compiled yet."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        self._loop = load_loop(np.dtype(dtype).name)  # before the threads begin: it may raise
        super().__init__(dtype, threads)
        self._memory = [_Memory(dtype) for _ in range(threads)]

    @override
    def _step_share(self, thread: int, parts: Sequence[Part], step: RangeStep) -> None:
        check_denormals()
        memory, slots = self._memory[thread], step.slots
        known, sizes = memory.gradients, step.grouping.sizes
        if (
            len(known) != len(step.gradients)
            or any(map(is_not, map(call, known), step.gradients))
            or memory.group_sizes != sizes
        ):
            memory.look_at(step.gradients, sizes)
        kept = 0 if step.keep is None else step.keep.ctypes.data
        coefficients, scales = step.scalars.coefficients, step.scales
        if len(memory.coefficients) != len(coefficients) or len(memory.scales) < len(scales):
            memory.make_room(len(coefficients), len(scales))
        memory.coefficients[:], memory.scales[: len(scales)] = coefficients, scales
        memory.count.value = NONE if step.grouping.count == 1 else step.grouping.count
        if memory.is_direct:
            known_call = memory.calls.get((id(slots), id(parts), kept))
            self._loop(*(known_call or memory.call(slots, parts, kept)).arguments)
            return
        for begin, end, pieces in memory.windows(parts, step.gradients):
            with own_errors():
                wide = [g[begin:end].astype(self._dtype, copy=False) for g in step.gradients]
            before = begin * self._dtype.itemsize  # the loop counts from the range's first
            addresses = [g.ctypes.data - before for g in wide]
            self._loop(*memory.arguments_of(slots, pieces, addresses, kept))


class _Bounds(NamedTuple):
    """Parts as the loop takes them: its numbers in memory, and how many parts."""

    numbers: Any
    parts: int


def _bounds(parts: Sequence[Part], begin: int, end: int) -> _Bounds:
    """Return what lies in [begin, end) of parts in order."""
    found = [
        number
        for part in parts
        for number in (max(begin, part.begin), min(end, part.end), part.setting, part.scale)
    ]
    return _Bounds((ctypes.c_ssize_t * len(found))(*found), len(parts))


class _Memory:
    """One thread's working memory: the numbers that the loop reads, by address.

    What depends on the gradients' arrays is kept for as long as the same arrays come, and so are
    the last `calls`, by the identities of their slots and part and where the mean is kept.
    """

    def __init__(self, dtype: Any) -> None:
        number = np.ctypeslib.as_ctypes_type(dtype)
        self._dtype = np.dtype(dtype)
        self._number = number
        self.count = number()
        self.coefficients: Any = ()
        self.scales: Any = ()
        self.gradients: list[weakref.ref[Array | Pieces]] = []  # keeps none of them alive
        self.group_sizes: Sequence[int] = ()
        self.addresses: list[int] = []
        self.is_direct = True  # the loop reads the gradients themselves, each in one array
        self.sizes: Any = ()
        self.calls: dict[tuple[int, int, int], _Call] = {}
        self._windows: tuple[Sequence[Part], list[tuple[int, int, _Bounds]]] = ([], [])

    def look_at(self, gradients: Sequence[Array | Pieces], sizes: Sequence[int]) -> None:
        """Learn where a step's gradients lie, and put the groups' sizes into memory."""
        self.gradients = [weakref.ref(array) for array in gradients]
        whole = [g for g in gradients if not isinstance(g, Pieces)]
        self.addresses = [array.ctypes.data for array in whole]
        self.is_direct = len(whole) == len(gradients) and all(
            gradient.dtype == self._dtype for gradient in gradients
        )
        self.group_sizes = sizes
        self.sizes = (ctypes.c_ssize_t * len(sizes))(*sizes)
        self.calls = {}
        self._windows = ([], [])

    def make_room(self, coefficients: int, scales: int) -> None:
        """Have memory for as many coefficients and scales."""
        self.coefficients = (self._number * coefficients)()
        self.scales = (self._number * scales)()
        self.calls = {}

    def call(self, slots: Slots, parts: Sequence[Part], kept: int) -> "_Call":
        """Return the call for parts whose gradients the loop reads where they lie, and keep it."""
        bounds = _bounds(parts, 0, parts[-1].end if parts else 0)
        found = _Call(slots, parts, self.arguments_of(slots, bounds, self.addresses, kept))
        if len(self.calls) >= _MOST_CALLS:
            self.calls = {}
        self.calls[id(slots), id(parts), kept] = found
        return found

    def windows(
        self, parts: Sequence[Part], gradients: Sequence[Array | Pieces]
    ) -> Sequence[tuple[int, int, _Bounds]]:
        """Return the stretches of parts in order that the loop takes at a time, and what of the
        parts lies in each: a stretch lies in one array of every gradient, and is short where one
        must be widened.
        """
        if self._windows[0] is parts or not parts:
            return self._windows[1] if parts else []
        begin, end = parts[0].begin, parts[-1].end
        borders = [border for g in gradients if isinstance(g, Pieces) for border in g.bounds]
        has_half = any(gradient.dtype != self._dtype for gradient in gradients)
        found, first = [], 0
        for low, high in stretches(begin, end, WIDENED if has_half else end - begin, borders):
            last = first
            while last < len(parts) and parts[last].begin < high:
                last += 1
            if first < last:
                found.append((low, high, _bounds(parts[first:last], low, high)))
            first = last - 1 if first < last and parts[last - 1].end > high else last
        self._windows = parts, found
        return found

    def arguments_of(
        self, slots: Slots, bounds: _Bounds, gradients: Sequence[int], kept: int
    ) -> tuple[Any, ...]:
        """Return the loop's arguments.

        Args:
            slots: the range's arrays.
            bounds: what is stepped of it.
            gradients: where the range's first element would lie in each gradient.
            kept: where the range's mean gradient is kept; 0 for nowhere.
        """
        streams = slots.out is not None and slots.out.nbytes >= STREAMED_BYTES
        return (
            len(self.sizes),
            bounds.parts,
            streams,
            (ctypes.c_size_t * len(gradients))(*gradients),
            self.sizes,
            *slots.addresses,
            bounds.numbers,
            self.coefficients,
            ctypes.addressof(self.count),
            self.scales,
            kept or None,
            None if slots.rounded is None else slots.rounded.ctypes.data,
            CONSTANTS,
        )
