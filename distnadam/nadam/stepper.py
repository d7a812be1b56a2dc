"""What every kernel is: a stepper of ranges of one element space, by blocks that stay in the cache
and by threads. Arrays only; no shards, no clocks, no I/O.

Everything is written into preallocated memory; nothing the size of the model is ever allocated. The
order of operations in `NumPyStepper` is the canonical one: every kernel gives the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from distnadam.errors import KernelError
from distnadam.nadam.averaging import update_average
from distnadam.nadam.mean import BLOCK_BYTES, Grouping
from distnadam.nadam.step_scalars import NONE, StepScalars
from distnadam.tensors.arrays import Array
from distnadam.tensors.pieces import Pieces
from distnadam.threads import renew_after_fork

_DENORMAL, _ONE = 5e-324, 1.0
UNSCALED = (NONE,)
"""The scales of a step whose mean gradient is taken as it is."""


@dataclass(frozen=True)
class Slots:
    """The arrays of one range of one space: contiguous, 1-D, of one dtype and length.

    Attributes:
        p: the parameters; a step reads them, and writes them if `out` is None.
        m: the first moment.
        v: the second moment.
        out: where the new parameters go; None for `p` itself.
        rounded: where the new parameters go a second time, rounded to bfloat16; None for nowhere.
        ema: the average of the parameters, to be updated by the new ones; None if none is kept.
        m_out: where the new first moment goes; None for `m` itself.
        v_out: where the new second moment goes; None for `v` itself.
        ema_out: where the new average goes; None for `ema` itself.
    """

    p: Array
    m: Array
    v: Array
    out: Array | None = None
    rounded: Array | None = None
    ema: Array | None = None
    m_out: Array | None = None
    v_out: Array | None = None
    ema_out: Array | None = None

    @cached_property
    def written(self) -> Array:
        """Where the new parameters go."""
        return self.p if self.out is None else self.out

    @cached_property
    def moments_out(self) -> tuple[Array, Array]:
        """Where the new moments go."""
        return (
            self.m if self.m_out is None else self.m_out,
            self.v if self.v_out is None else self.v_out,
        )

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where in memory the parameters, both moments, and all three new ones begin."""
        arrays = self.p, self.m, self.v, self.written, *self.moments_out
        return tuple(array.ctypes.data for array in arrays)


@dataclass(frozen=True)
class Part:
    """Elements [begin, end) of a range that step alike.

    Attributes:
        begin: the first element.
        end: the first behind them.
        setting: the index of their coefficients in `StepScalars.coefficients`.
        scale: the index in `RangeStep.scales` of the factor of their mean gradient.
    """

    begin: int
    end: int
    setting: int = 0
    scale: int = 0


Shares = Sequence[Sequence[Part]]
"""The parts that each thread steps, in order."""


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class RangeStep:
    """One step of one range, the same for all its parts.

    Attributes:
        slots: the range's arrays.
        gradients: arrays, or pieces of them, of the range's length, in its dtype or in half
            precision, which is widened first; in rank order.
        grouping: how they are averaged.
        scalars: the step's.
        scales: factors of the mean gradient, chosen by each part; NaN is none.
        keep: where the mean gradient, scaled and clipped, is left for a standby, but where no part
            lies; None leaves it nowhere.
    """

    slots: Slots
    gradients: Sequence[Array | Pieces]
    grouping: Grouping
    scalars: StepScalars
    scales: Sequence[float] = UNSCALED
    keep: Array | None = None


class Stepper(ABC):
    """Steps ranges of one dtype with up to `threads` threads; for one caller at a time."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        self._dtype = np.dtype(dtype)
        self._threads = threads
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Have threads of this process."""
        more = self._threads > 1
        self._pool = ThreadPoolExecutor(self._threads, "nadam-kernel") if more else None

    def share(self, parts: Iterable[Part]) -> Shares:
        """Deal disjoint parts out to the threads as contiguous runs of nearly equal length; a
        thread gets at least one block's worth.
        """
        parts = [p for p in parts if p.begin < p.end]
        total = sum(p.end - p.begin for p in parts)
        threads = max(1, min(self._threads, total * self._dtype.itemsize // BLOCK_BYTES))
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
                shares[-1].append(replace(part, begin=begin, end=end))
                room -= end - begin
                begin = end
        return shares

    def step(self, step: RangeStep, shares: Shares) -> None:
        """Average the gradients and step the parts of `share`; the bits do not depend on the number
        of threads.
        """
        work = self._step_share if step.slots.ema is None else self._step_and_average
        if self._pool is None or len(shares) == 1:
            for parts in shares:
                work(0, parts, step)
        else:
            steps = [
                self._pool.submit(work, thread, parts, step) for thread, parts in enumerate(shares)
            ]
            wait(steps)  # what fails in one of them is raised once none reads the gradients
            for each in steps:
                each.result()

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _step_and_average(self, thread: int, parts: Sequence[Part], step: RangeStep) -> None:
        self._step_share(thread, parts, step)
        slots, how = step.slots, step.scalars.averaging
        average = slots.ema if slots.ema_out is None else slots.ema_out
        assert slots.ema is not None
        assert average is not None
        for part in parts:
            begin, end = part.begin, part.end
            if average is not slots.ema:
                np.copyto(average[begin:end], slots.ema[begin:end])
            update_average(how[part.setting], average, slots.written, slots.rounded, begin, end)

    @abstractmethod
    def _step_share(self, thread: int, parts: Sequence[Part], step: RangeStep) -> None:
        """Step parts with one thread's working memory, after `check_denormals` in that thread."""


def check_denormals() -> None:
    """Raise KernelError where this thread flushes denormal numbers to zero, which would change
    bits.
    """
    if not _DENORMAL * _ONE:  # one flag of the processor says it for all dtypes
        raise KernelError(
            "this thread flushes denormal numbers to zero (a library set FTZ/DAZ, as "
            "torch.set_flush_denormal does): switch that off"
        )
