"""A shard's computations: the norms of a round's mean gradient, and the step. No messages, no
files.
"""

from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import Scratch
from distnadam.nadam.norms import clip_scales, square_sums
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.nadam.stepper import Part, RangeStep, Shares, Slots
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
            {s: Slots(now[s], state.m[s], state.v[s]) for s in spec.ranges} for now in state.buffers
        ]
        self._sign = -1.0 if spec.config.maximize else None  # of the mean gradient
        self._whole = {
            space: self._steppers[space].share([Part(0, end - begin, self._sign)])
            for space, (begin, end) in spec.ranges.items()
        }
        self._segments = {
            space: list(spec.layout.segments(space, *bounds))
            for space, bounds in spec.ranges.items()
        }

    def close(self) -> None:
        """Stop the kernels' threads."""
        for stepper in self._steppers.values():
            stepper.close()

    def measure(self, shard: Shard) -> PartialNorms:
        """Sum the squares of the mean gradient, chunk by chunk."""
        gradients, grouping = shard.rounds.current.summands(shard.config.sum_group)
        found = []
        for space, segments in self._segments.items():
            offset = self._spec.ranges[space][0]
            scratch = Scratch(space)
            slices = [g[space] for g in gradients]
            found += [
                (s.tensor, square_sums(slices, grouping, s.begin - offset, s.end - offset, scratch))
                for s in segments
            ]
        return PartialNorms(shard.progress.round + 1, tuple(found))

    def step(self, shard: Shard, keep: Flat | None) -> tuple[Clock, float]:
        """Apply the round's mean gradient, leaving it in `keep`; what workers see of the new
        parameters goes to the spare buffer, unless the round is stepped in place.

        Raises:
            ConfigError: the learning-rate schedule raised, or gave no rate; no array was touched.
        """
        current, config = shard.rounds.current, shard.config
        gradients, grouping = current.summands(config.sum_group)
        square_sums = current.square_sums
        scalars = step_scalars(shard.progress.clock, config)
        active = shard.state.active
        for space, slots in (self._in_place if current.in_place else self._slots)[active].items():
            step = RangeStep(
                slots=slots,
                gradients=[g[space] for g in gradients],
                grouping=grouping,
                scalars=scalars,
                clipvalue=config.clipvalue,
                keep=None if keep is None else keep[space],
            )
            whole = self._whole[space]
            shares = whole if square_sums is None else self._clip(shard, space, square_sums)
            self._steppers[space].step(step, shares)
        return scalars.after, scalars.lr

    def _clip(self, shard: Shard, space: str, square_sums: Array) -> Shares:
        """Return the parts of a range, each with its factor by the whole model's norms."""
        begin, end = self._spec.ranges[space]
        scales = clip_scales(shard.config, square_sums)
        if self._sign is not None:
            scales = [self._sign * (1.0 if scale is None else scale) for scale in scales]
        if len(set(scales)) <= 1:
            parts = [Part(0, end - begin, scales[0])]
        else:
            parts = [
                Part(s.begin - begin, s.end - begin, scales[s.tensor])
                for s in self._segments[space]
            ]
        return self._steppers[space].share(parts)


def _slots(state: ShardState, space: str, now: Flat, following: Flat) -> Slots:
    """Return what a step of a space reads and writes, from one buffer to the other."""
    m, v, master = state.m[space], state.v[space], state.masters.get(space)
    if master is None:
        return Slots(now[space], m, v, following[space])
    return Slots(master, m, v, None, following[space])
