"""The step as one compiled loop, fed with gradients of the parameters' own precision."""

from typing import Any

from typing_extensions import override

from distnadam.nadam.fused import FusedLoop, warm_up
from distnadam.nadam.stepper import Part, RangeStep, Stepper

WIDENED = 65536
"""Elements of half precision that are widened at a time before the loop takes them."""


class FusedStepper(Stepper):
    """The step as one compiled loop over memory; needs numba."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        warm_up(dtype)  # before the threads begin, since it may raise
        super().__init__(dtype, threads)
        self._loops = [FusedLoop(dtype) for _ in range(threads)]

    @override
    def _step_part(self, thread: int, part: Part, step: RangeStep) -> None:
        slots = step.slots
        keep = step.keep
        out = slots.p if slots.out is None else slots.out
        has_half = any(g.dtype != self._dtype for g in step.gradients)
        stride = WIDENED if has_half else max(1, part.end - part.begin)
        run = self._loops[thread].run
        for begin in range(part.begin, part.end, stride):
            cut = slice(begin, min(begin + stride, part.end))
            wide = [g[cut].astype(self._dtype, copy=False) for g in step.gradients]
            arrays = slots.p[cut], slots.m[cut], slots.v[cut], out[cut]
            kept = None if keep is None else keep[cut]
            run(arrays, wide, step.coefficients, part.scale, step.clipvalue, kept)
