"""A shard's computations: the norms of a round's mean gradient, and the step. No messages, no
files.
"""

from collections.abc import Iterator, Sequence
from math import isnan

import numpy as np

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import Scratch
from distnadam.nadam.norms import clip_scales, square_sums
from distnadam.nadam.parts import Arrangement, Arranger
from distnadam.nadam.step_scalars import Clock, StepScalars, step_scalars
from distnadam.nadam.stepper import UNSCALED, RangeStep, Shares, Slots, Stepper
from distnadam.protocol.messages import PartialNorms, Push, ShardSpec
from distnadam.shard.machine import Shard
from distnadam.shard.round import Round
from distnadam.shard.state import ShardState, stretches_of
from distnadam.tensors.arrays import Array, Flat


class StepsAhead:
    """The steps of rounds that differ in their scalars alone.

    Args:
        steps: for each buffer that a step may begin at, each space's with its stepper and shares.
        follows: for each of these, the buffer that the next step begins at.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[tuple[Stepper, RangeStep, Shares]]],
        follows: tuple[int, int],
    ) -> None:
        self._steps = steps
        self.follows = follows

    def step(self, active: int, scalars: StepScalars) -> None:
        """Step from one buffer to that which follows."""
        for stepper, step, shares in self._steps[active]:
            step.scalars = scalars
            stepper.step(step, shares)


class ShardKernel:
    """Computes on what one shard's state machine holds.

    Args:
        spec: the shard's.
        state: the shard's.
        threads: of its kernel.
    """

    def __init__(self, spec: ShardSpec, state: ShardState, threads: int) -> None:
        self._spec = spec
        self._steppers = {
            space: make_stepper(spec.options.kernel, space, threads) for space in spec.ranges
        }
        self._take(state)
        self._arranger = Arranger(spec.layout, spec.ranges, self._steppers)
        self._config = spec.config
        self._ordinary: Arrangement | None = None  # of every round with `_config` that is
        self._stretches = stretches_of(spec.layout, spec.ranges)
        self._in_both: frozenset[int] = frozenset()  # the tensors that both buffers hold alike
        self._in_both_since = -1  # the count of writes then
        self._signs = (-1.0,) if spec.config.maximize else UNSCALED  # of the mean gradient

    def _take(self, state: ShardState) -> None:
        """Learn where the state lies."""
        self._copies = state.copies
        self._slots = [
            {s: _slots(state, s, active) for s in self._spec.ranges} for active in range(2)
        ]
        self._in_place = [
            {
                s: Slots(now[s], state.m[s], state.v[s], ema=_average(state, s))
                for s in self._spec.ranges
            }
            for now in state.buffers
        ]

    def close(self) -> None:
        """Stop the kernels' threads."""
        for stepper in self._steppers.values():
            stepper.close()

    def measure(self, shard: Shard) -> PartialNorms:
        """Sum the squares of the mean gradient, chunk by chunk."""
        gradients, grouping = shard.rounds.current.summands(shard.config.sum_group)
        found: list[tuple[int, Array]] = []
        for space, parts in self._arrangement(shard).by_tensor.items():
            scratch = Scratch(space)
            slices = [g[space] for g in gradients]
            stretches = [(part.begin, part.end) for part in parts]
            sums = square_sums(slices, grouping, stretches, scratch)
            found += zip((part.scale for part in parts), sums, strict=True)
        return PartialNorms(shard.progress.round + 1, tuple(found))

    def step(self, shard: Shard, keep: Flat | None) -> tuple[Clock, float]:
        """Apply the round's mean gradient, leaving it in `keep`; what workers see of the new
        parameters goes to the spare buffer, unless the round is stepped in place.

        Raises:
            ConfigError: the learning-rate schedule raised, or gave no rate; no array was touched.
        """
        current, config = shard.rounds.current, shard.config
        arranged, clock, overrides = self._ordinary, shard.progress.clock, current.overrides
        is_same = current.is_ordinary and clock.tensors is None and config is self._config
        if arranged is None or not is_same:
            arranged = self._arrangement(shard)
        gradients, grouping = current.summands(config.sum_group)
        square_sums = current.square_sums
        scales = self._signs if square_sums is None else self._scales(config, square_sums)
        parts = arranged.shares_by_tensor if len(scales) > 1 else arranged.together
        apart = arranged if arranged.tells_clocks_apart else None
        scalars = step_scalars(clock, config, overrides, apart)
        if shard.state.copies is not self._copies:
            self._take(shard.state)
        active, in_place = shard.state.active, current.in_place or shard.state.in_place
        for space, slots in (self._in_place if in_place else self._slots)[active].items():
            step = RangeStep(
                slots=slots,
                gradients=[g[space] for g in gradients],
                grouping=grouping,
                scalars=scalars,
                scales=scales,
                keep=None if keep is None else keep[space],
            )
            self._steppers[space].step(step, parts[space])
        if self._in_both or len(arranged.stepped) < len(self._spec.layout.tensors):
            self._copy_others(shard.state, arranged.stepped, in_place=in_place)
        return scalars.after, scalars.lr

    def steps_ahead(
        self, shard: Shard, pushes: Sequence[Push], *, in_place: bool = False
    ) -> "StepsAhead | None":
        """Return the steps of the rounds from the next on, as long as each is ordinary and these
        pushes' gradients lie where they are; None if such rounds are not stepped from one
        buffer to the other alone, or, if they are `in_place`, in one.
        """
        arranged, config, state = self._ordinary, shard.config, shard.state
        if (
            arranged is None
            or config is not self._config
            or shard.progress.clock.tensors is not None
            or state.in_place
            or state.copies is not self._copies
            or self._in_both
            or len(arranged.stepped) < len(self._spec.layout.tensors)
        ):
            return None
        alike = Round(self._spec.index, pushes={push.rank: push for push in pushes})
        gradients, grouping = alike.summands(config.sum_group)
        return StepsAhead(
            [
                [
                    (
                        self._steppers[space],
                        RangeStep(
                            slots=slots,
                            gradients=[g[space] for g in gradients],
                            grouping=grouping,
                            scalars=step_scalars(shard.progress.clock, config),
                            scales=self._signs,
                        ),
                        arranged.together[space],
                    )
                    for space, slots in by_space.items()
                ]
                for by_space in (self._in_place if in_place else self._slots)
            ],
            follows=(0, 1) if in_place else (1, 0),
        )

    def _arrangement(self, shard: Shard) -> Arrangement:
        """Return how the present round is stepped; keep it if all such rounds are."""
        current, clock = shard.rounds.current, shard.progress.clock
        found = self._arranger.of(shard.config, clock, current.absent, current.overrides)
        is_ordinary = not current.absent and not found.tells_clocks_apart
        self._ordinary, self._config = (found if is_ordinary else None), shard.config
        return found

    def _scales(self, config: NadamConfig, square_sums: Array) -> Sequence[float]:
        """Return the factor of each tensor's mean gradient by the whole model's norms, or one that
        is that of all.
        """
        scales = clip_scales(config, square_sums, self._arranger.groups)
        if config.maximize:
            scales = [-1.0 if isnan(scale) else -scale for scale in scales]
        first = scales[0]
        is_common = all(scale == first or (isnan(scale) and isnan(first)) for scale in scales)
        return scales[:1] if is_common else scales

    def _copy_others(self, state: ShardState, stepped: frozenset[int], *, in_place: bool) -> None:
        """Have the tensors that the round has not stepped in the spare buffer too, once after they
        changed.
        """
        others = self._stretches.keys() - stepped
        if self._in_both_since != state.written:
            self._in_both, self._in_both_since = frozenset(), state.written
        if not in_place:
            for tensor in others - self._in_both:
                space, first, last = self._stretches[tensor]
                for old, new in _twins(state, space):
                    np.copyto(new[first:last], old[first:last])
            self._in_both = frozenset(others)
        else:
            self._in_both -= stepped


def _slots(state: ShardState, space: str, active: int) -> Slots:
    """Return what a step of a space reads and writes, from one buffer to the other."""
    now, following = state.buffers[active], state.buffers[1 - active]
    if state.copies is not None:
        old, new = state.copies[active], state.copies[1 - active]
        is_rounded = space in state.masters
        keeps_average = "ema" in old
        return Slots(
            p=old["masters"][space] if is_rounded else now[space],
            m=old["m"][space],
            v=old["v"][space],
            out=new["masters"][space] if is_rounded else following[space],
            rounded=following[space] if is_rounded else None,
            ema=old["ema"][space] if keeps_average else None,
            m_out=new["m"][space],
            v_out=new["v"][space],
            ema_out=new["ema"][space] if keeps_average else None,
        )
    m, v, master = state.m[space], state.v[space], state.masters.get(space)
    ema = _average(state, space)
    if master is None:
        return Slots(now[space], m, v, following[space], ema=ema)
    return Slots(master, m, v, None, following[space], ema)


def _twins(state: ShardState, space: str) -> Iterator[tuple[Array, Array]]:
    """Yield the arrays of a space that a step reads, each with where it writes the new one."""
    yield state.seen[space], state.spare[space]
    if state.copies is not None:
        old, new = state.copies[state.active], state.copies[1 - state.active]
        for name, flat in old.items():
            yield flat[space], new[name][space]


def _average(state: ShardState, space: str) -> Array | None:
    return None if state.ema is None else state.ema[space]
