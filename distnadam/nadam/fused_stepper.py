"""The step as one compiled loop over memory, called on the arrays' addresses.

Gradients of half precision are widened before, piece by piece.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.nadam.fused import load_loop
from distnadam.nadam.fused_abi import BLOCK
from distnadam.nadam.stepper import Part, RangeStep, Stepper, check_denormals
from distnadam.tensors.arrays import own_errors

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
        memory, size, keep = self._memory[thread], self._dtype.itemsize, step.keep
        rounded = step.slots.rounded
        gradients, grouping, clip = step.gradients, step.grouping, step.clipvalue
        sizes = (ctypes.c_ssize_t * len(grouping.sizes))(*grouping.sizes)
        has_half = {g.dtype for g in gradients} != {self._dtype}
        memory.coefficients[:] = step.scalars.coefficients
        for part in parts:
            memory.modifiers[:] = (
                grouping.count,
                math.nan if part.scale is None else part.scale,
                math.nan if clip is None else clip,
            )
            stride = WIDENED if has_half else part.end
            for begin in range(part.begin, part.end, stride):
                end = min(begin + stride, part.end)
                wide = [g[begin:end].astype(self._dtype, copy=False) for g in gradients]
                kept = None if keep is None else keep[begin:end]
                self._loop(
                    end - begin,
                    len(wide),
                    len(sizes),
                    0 if kept is None else end - begin,
                    memory.mean,
                    (ctypes.c_size_t * len(wide))(*[g.ctypes.data for g in wide]),
                    sizes,
                    *[address + begin * size for address in step.slots.addresses],
                    *memory.numbers,
                    memory.new,
                    None if kept is None else kept.ctypes.data,
                    None if rounded is None else rounded[begin:end].ctypes.data,
                )


class _Memory:
    """One thread's working memory: two blocks, and the numbers that the loop reads, by address."""

    def __init__(self, dtype: Any) -> None:
        self._blocks = np.empty(2 * BLOCK + _APART, dtype)
        self.mean = self._blocks.ctypes.data
        self.new = self._blocks[-BLOCK:].ctypes.data
        self.coefficients = np.empty(5, dtype)
        self.modifiers = np.empty(3, dtype)
        self.numbers = self.coefficients.ctypes.data, self.modifiers.ctypes.data
