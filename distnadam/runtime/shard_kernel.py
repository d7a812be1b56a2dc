"""A shard's computations: the norms of a round's mean gradient, and the step. No messages, no
files.
"""

from collections.abc import Sequence
from math import isnan

import numpy as np

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import Scratch
from distnadam.nadam.norms import clip_scales, square_sums
from distnadam.nadam.parts import Parts
from distnadam.nadam.step_overrides import sets_groups
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.nadam.stepper import UNSCALED, RangeStep, Slots
from distnadam.protocol.messages import PartialNorms, ShardSpec
from distnadam.shard.machine import Shard
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Array, Flat


class ShardKernel:
    """Computes on what one shard's state machine holds.

    Args:
        spec: the shard's.
        state: the shard's, always the same arrays.
        threads: of its kernel.
    """

    def __init__(self, spec: ShardSpec, state: ShardState, threads: int) -> None:
        self._spec = spec
        self._steppers = {
            space: make_stepper(spec.options.kernel, space, threads) for space in spec.ranges
        }
        self._slots = [
            {s: _slots(state, s, now, following) for s in spec.ranges}
            for now, following in (state.buffers, state.buffers[::-1])
        ]
        self._in_place = [
            {s: Slots(now[s], state.m[s], state.v[s], ema=_average(state, s)) for s in spec.ranges}
            for now in state.buffers
        ]
        self._is_by_group = False  # whether a group ever had a rate of one step alone
        self._arrange(spec.config)
        self._frozen = any(state.frozen.values())
        self._frozen_written = -1  # the count of writes whose frozen tensors are in both buffers
        self._signs = (-1.0,) if spec.config.maximize else UNSCALED  # of the mean gradient

    def _arrange(self, config: NadamConfig) -> None:
        """Cut the ranges into parts that step alike, and deal them out to the threads."""
        self._config = config
        self._parts = {
            space: Parts(config, self._spec.layout, space, bounds, by_group=self._is_by_group)
            for space, bounds in self._spec.ranges.items()
        }
        self._together, self._by_tensor = (
            {space: self._steppers[space].share(each) for space, each in parts.items()}
            for parts in (
                {space: parts.together for space, parts in self._parts.items()},
                {space: parts.by_tensor for space, parts in self._parts.items()},
            )
        )

    def close(self) -> None:
        """Stop the kernels' threads."""
        for stepper in self._steppers.values():
            stepper.close()

    def measure(self, shard: Shard) -> PartialNorms:
        """Sum the squares of the mean gradient, chunk by chunk."""
        gradients, grouping = shard.rounds.current.summands(shard.config.sum_group)
        found = []
        for space, parts in self._parts.items():
            scratch = Scratch(space)
            slices = [g[space] for g in gradients]
            found += [
                (part.scale, square_sums(slices, grouping, part.begin, part.end, scratch))
                for part in parts.by_tensor
            ]
        return PartialNorms(shard.progress.round + 1, tuple(found))

    def step(self, shard: Shard, keep: Flat | None) -> tuple[Clock, float]:
        """Apply the round's mean gradient, leaving it in `keep`; what workers see of the new
        parameters goes to the spare buffer, unless the round is stepped in place.

        Raises:
            ConfigError: the learning-rate schedule raised, or gave no rate; no array was touched.
        """
        current, config = shard.rounds.current, shard.config
        overrides = current.overrides
        by_group = bool(overrides) and sets_groups(overrides) and not self._is_by_group
        if by_group or config.groups != self._config.groups:
            self._is_by_group |= by_group
            self._arrange(config)  # groups that were alike may not be so any more
        gradients, grouping = current.summands(config.sum_group)
        square_sums = current.square_sums
        scales = self._signs if square_sums is None else self._scales(config, square_sums)
        parts = self._by_tensor if len(scales) > 1 else self._together
        scalars = step_scalars(shard.progress.clock, config, overrides)
        active = shard.state.active
        for space, slots in (self._in_place if current.in_place else self._slots)[active].items():
            step = RangeStep(
                slots=slots,
                gradients=[g[space] for g in gradients],
                grouping=grouping,
                scalars=scalars,
                scales=scales,
                keep=None if keep is None else keep[space],
            )
            self._steppers[space].step(step, parts[space])
        if self._frozen and not current.in_place:
            self._copy_frozen(shard.state)
        return scalars.after, scalars.lr

    def _scales(self, config: NadamConfig, square_sums: Array) -> Sequence[float]:
        """Return the factor of each tensor's mean gradient by the whole model's norms, or one that
        is that of all.
        """
        groups = next(iter(self._parts.values())).groups
        scales = clip_scales(config, square_sums, groups)
        if config.maximize:
            scales = [-1.0 if isnan(scale) else -scale for scale in scales]
        first = scales[0]
        is_common = all(scale == first or (isnan(scale) and isnan(first)) for scale in scales)
        return scales[:1] if is_common else scales

    def _copy_frozen(self, state: ShardState) -> None:
        """Have the frozen tensors in the spare buffer too, once after they were written."""
        if self._frozen_written == state.written:
            return
        for space, stretches in state.frozen.items():
            for first, last in stretches:
                np.copyto(state.spare[space][first:last], state.seen[space][first:last])
        self._frozen_written = state.written


def _slots(state: ShardState, space: str, now: Flat, following: Flat) -> Slots:
    """Return what a step of a space reads and writes, from one buffer to the other."""
    m, v, master = state.m[space], state.v[space], state.masters.get(space)
    ema = _average(state, space)
    if master is None:
        return Slots(now[space], m, v, following[space], ema=ema)
    return Slots(master, m, v, None, following[space], ema)


def _average(state: ShardState, space: str) -> Array | None:
    return None if state.ema is None else state.ema[space]
