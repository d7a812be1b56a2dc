"""The step as one compiled loop over memory, called on the arrays' addresses.

Gradients of half precision are widened before, piece by piece.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.nadam.fused import load_loop
from distnadam.nadam.fused_abi import BLOCK
from distnadam.nadam.stepper import Part, RangeStep, Stepper, check_denormals
from distnadam.tensors.arrays import Array, own_errors

WIDENED = 65536
"""Elements of half precision that are widened at a time before the loop takes them."""
_APART = 48
"""Elements between the scratch arrays, so that they do not fall into the same sets of the cache."""


class FusedStepper(Stepper):
    """The step as one compiled loop; needs llvmlite, and numba where no loop is compiled yet."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        self._loop = load_loop(np.dtype(dtype).name)  # before the threads begin: it may raise
        super().__init__(dtype, threads)
        self._memory = [_Memory(dtype) for _ in range(threads)]

    @override
    @own_errors()
    def _step_share(self, thread: int, parts: Sequence[Part], step: RangeStep) -> None:
        check_denormals(self._dtype)
        memory, size = self._memory[thread], self._dtype.itemsize
        slots, keep, clip = step.slots, step.keep, step.clipvalue
        gradients = memory.gradients_of(step.gradients)
        grouping, sizes = step.grouping, memory.sizes_of(step.grouping.sizes)
        kept = None if keep is None else keep.ctypes.data
        memory.coefficients[:] = step.scalars.coefficients
        for part in parts:
            memory.modifiers[:] = (
                grouping.count,
                math.nan if part.scale is None else part.scale,
                math.nan if clip is None else clip,
            )
            stride = WIDENED if gradients.has_half else part.end
            for begin in range(part.begin, part.end, stride):
                end = min(begin + stride, part.end)
                if gradients.has_half:
                    wide = [g[begin:end].astype(self._dtype, copy=False) for g in step.gradients]
                    addresses = [g.ctypes.data for g in wide]
                else:
                    addresses = [address + begin * size for address in gradients.addresses]
                self._loop(
                    end - begin,
                    len(addresses),
                    len(sizes),
                    0 if kept is None else end - begin,
                    memory.mean,
                    (ctypes.c_size_t * len(addresses))(*addresses),
                    sizes,
                    *[address + begin * size for address in slots.addresses],
                    *memory.numbers,
                    memory.new,
                    None if kept is None else kept + begin * size,
                    None if slots.rounded is None else slots.rounded[begin:end].ctypes.data,
                )


class _Memory:
    """One thread's working memory: two blocks, and the numbers that the loop reads, by address.

    What depends on the gradients' arrays is kept for as long as the same arrays come.
    """

    def __init__(self, dtype: Any) -> None:
        number = np.ctypeslib.as_ctypes_type(dtype)
        self._dtype = np.dtype(dtype)
        self._blocks = np.empty(2 * BLOCK + _APART, dtype)
        self.mean = self._blocks.ctypes.data
        self.new = self._blocks[-BLOCK:].ctypes.data
        self.coefficients = (number * 5)()
        self.modifiers = (number * 3)()
        self.numbers = ctypes.addressof(self.coefficients), ctypes.addressof(self.modifiers)
        self._gradients = _Gradients([], self._dtype)
        self._sizes: tuple[Sequence[int], Any] = ((), ())

    def gradients_of(self, arrays: Sequence[Array]) -> "_Gradients":
        if not self._gradients.are(arrays):
            self._gradients = _Gradients(arrays, self._dtype)
        return self._gradients

    def sizes_of(self, sizes: Sequence[int]) -> Any:
        """Return the groups' sizes in memory."""
        if self._sizes[0] != sizes:
            self._sizes = sizes, (ctypes.c_ssize_t * len(sizes))(*sizes)
        return self._sizes[1]


class _Gradients:
    """Where gradients lie, and whether any is in half precision; keeps none of them alive."""

    def __init__(self, arrays: Sequence[Array], dtype: np.dtype[Any]) -> None:
        self._arrays = [weakref.ref(array) for array in arrays]
        self.addresses = [array.ctypes.data for array in arrays]
        self.has_half = any(array.dtype != dtype for array in arrays)

    def are(self, arrays: Sequence[Array]) -> bool:
        """Whether these are they."""
        return len(arrays) == len(self._arrays) and all(
            known() is array for known, array in zip(self._arrays, arrays, strict=True)
        )
