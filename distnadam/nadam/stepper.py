"""What every kernel is: a stepper of ranges of one element space, by blocks that stay in the cache
and by threads. Arrays only; no shards, no clocks, no I/O.

Everything is written into preallocated memory; nothing the size of the model is ever allocated. The
order of operations in `NumPyStepper` is the canonical one: every kernel gives the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from distnadam.errors import KernelError
from distnadam.nadam.mean import BLOCK_BYTES
from distnadam.nadam.step_scalars import StepScalars
from distnadam.tensors.arrays import SPACES, Array

_DENORMAL = {
    np.dtype(name): (np.array(np.finfo(name).smallest_subnormal), np.array(1, name))
    for name in SPACES
}


@dataclass(frozen=True)
class Slots:
    """The arrays of one range of one space, 1-D, of one dtype and length.

    Attributes:
        p: the parameters; a step reads them, and writes them if `out` is None.
        m: the first moment, updated in place.
        v: the second moment, updated in place.
        out: where the new parameters go; None for `p` itself.
    """

    p: Array
    m: Array
    v: Array
    out: Array | None = None


@dataclass(frozen=True)
class Part:
    """Elements [begin, end) of a range, whose mean gradient is multiplied by `scale`, unless it is
    None.
    """

    begin: int
    end: int
    scale: float | None = None


@dataclass(frozen=True)
class StepConstants:
    """The scalars of every step of a configuration.

    Attributes:
        one_minus_beta_1: weight of the gradient in the first moment.
        one_minus_beta_2: weight of the squared gradient in the second moment.
        clipvalue: largest magnitude of an element of the mean gradient; None does not clip.
    """

    one_minus_beta_1: float
    one_minus_beta_2: float
    clipvalue: float | None = None


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class RangeStep:
    """One step of one range, the same for all its parts.

    Attributes:
        slots: the range's arrays.
        gradients: one array per worker, in the range's dtype or in half precision.
        coefficients: of the gradient, of the momentum, epsilon, one minus either beta, in the
            range's dtype.
        clipvalue: largest magnitude of an element of the mean gradient; None does not clip.
        keep: where the mean gradient, scaled and clipped, is left; None leaves it nowhere.
    """

    slots: Slots
    gradients: Sequence[Array]
    coefficients: Array
    clipvalue: float | None
    keep: Array | None


class Stepper(ABC):
    """Steps ranges of one dtype with up to `threads` threads; for one caller at a time."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        self._dtype = np.dtype(dtype)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "nadam-kernel") if threads > 1 else None

    def step(
        self,
        slots: Slots,
        gradients: Sequence[Array],
        scalars: StepScalars,
        rates: StepConstants,
        parts: Sequence[Part],
        keep: Array | None = None,
    ) -> None:
        """Average `gradients` in their order and step `slots`, part by part; the bits do not depend
        on the number of threads.

        Args:
            slots: the range's arrays.
            gradients: one array per worker of the range's length, in its dtype or in half
                precision, which is widened first.
            scalars: the step's.
            rates: the step's.
            parts: what to step, disjoint.
            keep: where the mean gradient, scaled and clipped, is left for a standby.
        """
        values = (
            scalars.gradient,
            scalars.momentum,
            scalars.epsilon,
            rates.one_minus_beta_1,
            rates.one_minus_beta_2,
        )
        range_step = RangeStep(
            slots=slots,
            gradients=gradients,
            coefficients=np.array(values, self._dtype),
            clipvalue=rates.clipvalue,
            keep=keep,
        )
        shares = share(parts, self._threads, BLOCK_BYTES // self._dtype.itemsize)

        def run(index: int) -> None:
            check_denormals(self._dtype)
            for part in shares[index]:
                self._step_part(index, part, range_step)

        if self._pool is None or len(shares) == 1:
            for index in range(len(shares)):
                run(index)
        else:
            list(self._pool.map(run, range(len(shares))))

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    @abstractmethod
    def _step_part(self, thread: int, part: Part, step: RangeStep) -> None:
        """Step one part with one thread's working memory."""


def check_denormals(dtype: np.dtype[Any]) -> None:
    """Raise KernelError where this thread flushes denormal numbers to zero, which would change
    bits.
    """
    tiny, one = _DENORMAL[dtype]
    if not np.multiply(tiny, one):
        raise KernelError(
            "this thread flushes denormal numbers to zero (a library set FTZ/DAZ, as "
            "torch.set_flush_denormal does): switch that off"
        )


def share(parts: Iterable[Part], threads: int, block: int) -> list[list[Part]]:
    """Deal the parts out to threads as contiguous runs of nearly equal length; a thread gets at
    least one block's worth.
    """
    parts = [p for p in parts if p.begin < p.end]
    total = sum(p.end - p.begin for p in parts)
    threads = max(1, min(threads, total // block))
    if threads == 1:
        return [parts]
    quota = -(-total // threads)
    shares: list[list[Part]] = [[]]
    room = quota
    for part in parts:
        begin = part.begin
        while begin < part.end:
            if room == 0:
                shares.append([])
                room = quota
            end = min(begin + room, part.end)
            shares[-1].append(Part(begin, end, part.scale))
            room -= end - begin
            begin = end
    return shares
