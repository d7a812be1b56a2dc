"""The step as one compiled loop over memory, called on the arrays' addresses.

Gradients of half precision are widened before, piece by piece.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from operator import call, is_not
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.nadam.fused import load_loop
from distnadam.nadam.fused_abi import BLOCK
from distnadam.nadam.stepper import Part, RangeStep, Stepper, check_denormals
from distnadam.tensors.arrays import Array, own_errors
from distnadam.tensors.pieces import Pieces, stretches

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
        known, sizes = memory.gradients, step.grouping.sizes
        if (
            len(known) != len(step.gradients)
            or any(map(is_not, map(call, known), step.gradients))
            or memory.group_sizes != sizes
        ):
            memory.look_at(step.gradients, sizes)
        kept = None if keep is None else keep.ctypes.data
        memory.coefficients[:] = step.scalars.coefficients
        for part in parts:
            memory.modifiers[:] = (
                step.grouping.count,
                math.nan if part.scale is None else part.scale,
                math.nan if clip is None else clip,
            )
            whole = [(part.begin, part.end)] if part.begin < part.end else []
            for begin, end in whole if memory.is_direct else self._stretches(part, step.gradients):
                if memory.is_direct:
                    addresses = [address + begin * size for address in memory.addresses]
                else:
                    wide = [g[begin:end].astype(self._dtype, copy=False) for g in step.gradients]
                    addresses = [g.ctypes.data for g in wide]
                self._loop(
                    end - begin,
                    len(addresses),
                    len(memory.sizes),
                    0 if kept is None else end - begin,
                    memory.mean,
                    (ctypes.c_size_t * len(addresses))(*addresses),
                    memory.sizes,
                    *[address + begin * size for address in slots.addresses],
                    *memory.numbers,
                    memory.new,
                    None if kept is None else kept + begin * size,
                    None if slots.rounded is None else slots.rounded[begin:end].ctypes.data,
                )

    def _stretches(
        self, part: Part, gradients: Sequence[Array | Pieces]
    ) -> Sequence[tuple[int, int]]:
        """Return the stretches of a part that the loop takes at a time: each lies in one array of
        every gradient, and is short where one must be widened.
        """
        bounds = [bound for g in gradients if isinstance(g, Pieces) for bound in g.bounds]
        has_half = any(gradient.dtype != self._dtype for gradient in gradients)
        return stretches(part.begin, part.end, WIDENED if has_half else part.end, bounds)


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
        self.gradients: list[weakref.ref[Array | Pieces]] = []  # keeps none of them alive
        self.group_sizes: Sequence[int] = ()
        self.addresses: list[int] = []
        self.is_direct = True  # the loop reads the gradients themselves, each in one array
        self.sizes: Any = ()

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
