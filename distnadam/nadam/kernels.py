"""One Nadam step over one range of one element space, in blocks that stay in the cache.

Everything is `out=` into preallocated scratch; nothing the size of the model is ever allocated. The
order of operations written here is the canonical one: every other kernel must give the same bits.
Arrays only; no shards, no clocks, no I/O.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distnadam.errors import KernelError
from distnadam.nadam.step_scalars import StepScalars
from distnadam.tensors.arrays import SPACES, Array
from distnadam.tensors.layout import CHUNK

BLOCK_BYTES = 768 * 1024
"""Bytes of one block of one array: smaller ones lose to the cost of a ufunc's call and to threads'
turns, larger ones leave the cache.
"""


WIDENED = 65536
"""Elements of half precision that are widened at a time before the fused loop takes them."""

KernelName = Literal["auto", "numpy", "fused"]

_DENORMAL = {
    np.dtype(name): (np.array(np.finfo(name).smallest_subnormal), np.array(1, name))
    for name in SPACES
}


@dataclass(frozen=True)
class Slots:
    """The arrays of one range of one space, 1-D, of one dtype and length: a step updates the
    moments and writes the new parameters.

    `out` is where they go; None means over the old ones.
    """

    p: Array
    m: Array
    v: Array
    out: Array | None = None


@dataclass(frozen=True)
class Part:
    """Elements [begin, end) of a range whose mean gradient is multiplied by `scale`; None leaves it
    as it is.
    """

    begin: int
    end: int
    scale: float | None = None


@dataclass(frozen=True)
class StepConstants:
    """The scalars of one step beside the schedule's: one minus each beta, and the clip value if
    any.
    """

    one_minus_beta_1: float
    one_minus_beta_2: float
    clipvalue: float | None = None


class Scratch:
    """Blocks of working memory for one thread and one dtype."""

    def __init__(self, dtype: Any) -> None:
        self.block = BLOCK_BYTES // np.dtype(dtype).itemsize
        self.mean, self.a, self.b = (np.empty(self.block, dtype) for _ in range(3))


class Stepper(ABC):
    """Steps ranges of one dtype with up to `threads` threads; owns their scratch. Not to be used by
    two callers at once.
    """

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        self._dtype, self._threads = np.dtype(dtype), threads
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
        coefficients = np.array(values, self._dtype)
        shares = share(parts, self._threads, BLOCK_BYTES // self._dtype.itemsize)

        def run(index: int) -> None:
            check_denormals(self._dtype)
            for part in shares[index]:
                self._step_part(index, slots, gradients, coefficients, part, rates.clipvalue, keep)

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
    def _step_part(
        self,
        thread: int,
        slots: Slots,
        gradients: Sequence[Array],
        coefficients: Array,
        part: Part,
        clipvalue: float | None,
        keep: Array | None,
    ) -> None:
        """Step one part with one thread's scratch."""


class NumPyStepper(Stepper):
    """The step by ufuncs, block by block."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        super().__init__(dtype, threads)
        self._scratch = [Scratch(dtype) for _ in range(threads)]

    def _step_part(
        self,
        thread: int,
        slots: Slots,
        gradients: Sequence[Array],
        coefficients: Array,
        part: Part,
        clipvalue: float | None,
        keep: Array | None,
    ) -> None:
        scratch, out = self._scratch[thread], slots.p if slots.out is None else slots.out
        c_g, c_m, epsilon, k_1, k_2 = coefficients
        for begin in range(part.begin, part.end, scratch.block):
            end = min(begin + scratch.block, part.end)
            p, m, v = slots.p[begin:end], slots.m[begin:end], slots.v[begin:end]
            mean, a, b = (
                scratch.mean[: end - begin],
                scratch.a[: end - begin],
                scratch.b[: end - begin],
            )
            g = clipped_mean([x[begin:end] for x in gradients], part.scale, clipvalue, mean, a)
            if keep is not None:
                np.copyto(keep[begin:end], g)
            np.subtract(g, m, out=a)
            np.multiply(a, k_1, out=a)
            np.add(m, a, out=m)
            np.multiply(g, g, out=b)
            np.subtract(b, v, out=b)
            np.multiply(b, k_2, out=b)
            np.add(v, b, out=v)
            np.sqrt(v, out=b)
            np.add(b, epsilon, out=b)
            np.multiply(g, c_g, out=mean)
            np.multiply(m, c_m, out=a)
            np.add(mean, a, out=a)
            np.divide(a, b, out=a)
            np.subtract(p, a, out=out[begin:end])


class FusedStepper(Stepper):
    """The step as one compiled loop over memory; needs numba."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        from distnadam.nadam import fused

        super().__init__(dtype, threads)
        self._fused = fused
        self._scratch = [fused.Scratch(dtype) for _ in range(threads)]
        fused.warm_up(dtype)

    def _step_part(
        self,
        thread: int,
        slots: Slots,
        gradients: Sequence[Array],
        coefficients: Array,
        part: Part,
        clipvalue: float | None,
        keep: Array | None,
    ) -> None:
        out = slots.p if slots.out is None else slots.out
        half = any(g.dtype != self._dtype for g in gradients)
        stride = WIDENED if half else max(1, part.end - part.begin)
        for begin in range(part.begin, part.end, stride):
            cut = slice(begin, min(begin + stride, part.end))
            wide = [g[cut].astype(self._dtype, copy=False) for g in gradients]
            arrays = slots.p[cut], slots.m[cut], slots.v[cut], out[cut]
            kept = None if keep is None else keep[cut]
            self._fused.run(
                arrays, wide, coefficients, part.scale, clipvalue, self._scratch[thread], kept
            )


def make_stepper(kernel: KernelName, dtype: Any, threads: int = 1) -> Stepper:
    """Return a stepper; "auto" is the fused one where numba is installed."""
    fused = kernel == "fused" or (kernel == "auto" and fused_installed())
    return FusedStepper(dtype, threads) if fused else NumPyStepper(dtype, threads)


def fused_installed() -> bool:
    """Whether numba can be imported here."""
    try:
        return importlib.util.find_spec("numba") is not None
    except ImportError:  # its import is blocked
        return False


def clipped_mean(
    gradients: Sequence[Array],
    scale: float | None,
    clipvalue: float | None,
    out: Array,
    spare: Array,
) -> Array:
    """Return the mean in the given order, scaled and clipped; the gradient itself, untouched, where
    there is nothing to do.
    """
    g = _widened(gradients[0], out)
    if len(gradients) > 1:
        np.add(g, _widened(gradients[1], spare), out=out)
        for other in gradients[2:]:
            np.add(out, _widened(other, spare), out=out)
        g = np.divide(out, out.dtype.type(len(gradients)), out=out)
    if scale is not None:
        g = np.multiply(g, out.dtype.type(scale), out=out)
    if clipvalue is not None:
        limit = out.dtype.type(clipvalue)
        g = np.clip(g, -limit, limit, out=out)
        if limit == 0:
            out.fill(0)  # of either sign otherwise, as the machine likes
    return g


def _widened(values: Array, buffer: Array) -> Array:
    if values.dtype == buffer.dtype:
        return values
    np.copyto(buffer, values)
    return buffer


def square_sums(gradients: Sequence[Array], begin: int, end: int, scratch: Scratch) -> Array:
    """Return the sum of squares of the mean gradient for each `CHUNK` of elements [begin, end),
    float64.

    Inside a chunk the upper half is added onto the lower until one value is left, a short chunk
    being filled with zeros: one written order, whatever the machine. `begin` must lie on its
    tensor's chunk grid.
    """
    sums = np.empty(-(-(end - begin) // CHUNK), np.float64)
    rows = scratch.block // CHUNK
    squares = np.empty((rows, CHUNK), np.float64)
    for row in range(0, len(sums), rows):
        low = begin + row * CHUNK
        high = min(low + rows * CHUNK, end)
        used = squares[: -(-(high - low) // CHUNK)]
        flat = used.reshape(-1)
        flat[: high - low] = clipped_mean(
            [x[low:high] for x in gradients],
            None,
            None,
            scratch.mean[: high - low],
            scratch.a[: high - low],
        )
        flat[high - low :] = 0.0
        with np.errstate(over="ignore"):  # an infinite norm is refused by name later
            np.multiply(used, used, out=used)
            width = CHUNK
            while width > 1:
                width //= 2
                np.add(used[:, :width], used[:, width : 2 * width], out=used[:, :width])
        sums[row : row + len(used)] = used[:, 0]
    return sums


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
