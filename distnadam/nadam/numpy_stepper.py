"""The step by NumPy's ufuncs, block by block. Its order of operations is the canonical one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.nadam.mean import Factor, Scratch, clipped_mean
from distnadam.nadam.step_scalars import PER_SETTING
from distnadam.nadam.stepper import Part, RangeStep, Stepper, check_denormals
from distnadam.tensors.arrays import Array, own_errors, round_into

_SHORT = 16384
"""Elements of a part below which it is stepped with its neighbours: calling the ufuncs takes longer
than what they do.
"""
_MOST_SHARES = 8
"""Shares whose runs are kept for later steps; a standby's every share is new."""


class NumPyStepper(Stepper):
    """The step by ufuncs, block by block."""

    def __init__(self, dtype: Any, threads: int = 1) -> None:
        super().__init__(dtype, threads)
        self._scratch = [Scratch(dtype) for _ in range(threads)]
        self._runs: list[dict[int, tuple[Sequence[Part], list[_Run]]]] = [{} for _ in self._scratch]

    @override
    @own_errors()
    def _step_share(self, thread: int, parts: Sequence[Part], step: RangeStep) -> None:
        check_denormals()
        scratch = self._scratch[thread]
        columns = np.array(step.scalars.coefficients, self._dtype).reshape(-1, PER_SETTING).T
        scales = np.array(step.scales, self._dtype)
        for run in self._runs_of(thread, parts, scratch.block):
            factors = [run.factor(column, run.settings, run.some_settings) for column in columns]
            factors.append(run.factor(scales, run.scales, run.some_scales))
            for begin in range(run.begin, run.end, scratch.block):
                end = min(begin + scratch.block, run.end)
                _step_block(begin, end, step, factors, scratch)

    def _runs_of(self, thread: int, parts: Sequence[Part], longest: int) -> "Sequence[_Run]":
        kept = self._runs[thread]
        found = kept.get(id(parts))
        if found is None:
            if len(kept) >= _MOST_SHARES:
                kept.clear()
            found = kept[id(parts)] = parts, list(_runs(parts, longest))
        return found[1]


def _step_block(
    begin: int,
    end: int,
    step: RangeStep,
    factors: Sequence[Factor | None],
    scratch: Scratch,
) -> None:
    slots = step.slots
    c_g, c_m, epsilon, k_1, k_2, decay, l2, limit, scale = factors
    assert c_m is not None
    assert epsilon is not None
    assert k_1 is not None
    assert k_2 is not None
    p, m, v = slots.p[begin:end], slots.m[begin:end], slots.v[begin:end]
    new_m, new_v = (array[begin:end] for array in slots.moments_out)
    blocks = mean, a, b = scratch.blocks(end - begin)
    gradients = [x[begin:end] for x in step.gradients]
    g = clipped_mean(gradients, step.grouping, scale, limit, blocks)
    if step.keep is not None:
        np.copyto(step.keep[begin:end], g)
    if l2 is not None:
        np.multiply(p, l2.value, out=a)
        g = np.add(l2.before(g, mean), a, out=mean, where=l2.where)
    np.subtract(g, m, out=a)
    np.multiply(a, k_1.value, out=a)
    np.add(m, a, out=new_m)
    np.multiply(g, g, out=b)
    np.subtract(b, v, out=b)
    np.multiply(b, k_2.value, out=b)
    np.add(v, b, out=new_v)
    np.sqrt(new_v, out=b)
    np.add(b, epsilon.value, out=b)
    np.multiply(new_m, c_m.value, out=a)
    if c_g is not None:
        np.multiply(g, c_g.value, out=mean)
        np.add(mean, a, out=a, where=c_g.where)
    np.divide(a, b, out=a)
    if decay is not None:
        np.multiply(p, decay.value, out=b)
        np.add(b, a, out=a, where=decay.where)
    np.subtract(p, a, out=slots.written[begin:end])
    if slots.rounded is not None:
        round_into(slots.rounded[begin:end], slots.written[begin:end])


@dataclass(frozen=True)
class _Run:
    """Neighbouring parts that are stepped together.

    Attributes:
        parts: in order, without gaps.
    """

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        assert all(a.end == b.begin for a, b in pairwise(self.parts))

    @cached_property
    def begin(self) -> int:
        """The first element."""
        return self.parts[0].begin

    @cached_property
    def end(self) -> int:
        """The first element behind them."""
        return self.parts[-1].end

    @cached_property
    def settings(self) -> Array:
        """The index of each part's setting."""
        return np.array([part.setting for part in self.parts])

    @cached_property
    def scales(self) -> Array:
        """The index of each part's scale."""
        return np.array([part.scale for part in self.parts])

    @cached_property
    def some_settings(self) -> Array:
        """The settings, each once."""
        return np.unique(self.settings)

    @cached_property
    def some_scales(self) -> Array:
        """The scales, each once."""
        return np.unique(self.scales)

    @cached_property
    def lengths(self) -> Array:
        """Elements of each part."""
        return np.array([part.end - part.begin for part in self.parts])

    def factor(self, values: Array, of_parts: Array, some: Array) -> Factor | None:
        """Return what each element is multiplied by, added or compared with; None for nothing.

        Args:
            values: of all settings or scales; NaN is none.
            of_parts: the index of each part's.
            some: these indices, each once.
        """
        first = values[some[0]]
        if len(some) == 1 or values[some].tobytes() == first.tobytes() * len(some):
            return None if first != first else Factor(first)
        of_each = values[of_parts]
        missing = np.isnan(of_each)
        return Factor(
            np.repeat(of_each, self.lengths),
            np.repeat(~missing, self.lengths) if missing.any() else True,
        )


def _runs(parts: Sequence[Part], longest: int) -> Iterator[_Run]:
    """Yield the parts in order, neighbours that are short together, up to a number of elements."""
    waiting: list[Part] = []
    for part in parts:
        if waiting and (
            waiting[-1].end != part.begin
            or part.end - waiting[0].begin > longest
            or max(part.end - part.begin, waiting[-1].end - waiting[-1].begin) >= _SHORT
        ):
            yield _Run(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield _Run(waiting)
