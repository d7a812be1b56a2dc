"""A shard's computations: the norms of a round's mean gradient, and the step. No messages, no
files.
"""

from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import Scratch
from distnadam.nadam.norms import clip_scales, square_sums
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.nadam.stepper import Part, Slots, StepConstants
from distnadam.protocol.messages import PartialNorms, ShardSpec
from distnadam.shard.machine import Shard
from distnadam.tensors.arrays import Flat


class ShardKernel:
    """Computes on what one shard's state machine holds.

    Args:
        spec: the shard's.
        threads: of its kernel.
    """

    def __init__(self, spec: ShardSpec, threads: int) -> None:
        self._spec = spec
        self._steppers = {
            space: make_stepper(spec.options.kernel, space, threads) for space in spec.ranges
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
        gradients, found = shard.rounds.current.gradients, []
        for space, segments in self._segments.items():
            offset = self._spec.ranges[space][0]
            scratch = Scratch(space)
            slices = [g[space] for g in gradients]
            found += [
                (s.tensor, square_sums(slices, s.begin - offset, s.end - offset, scratch))
                for s in segments
            ]
        return PartialNorms(shard.progress.round + 1, tuple(found))

    def step(self, shard: Shard, keep: Flat | None) -> tuple[Clock, float]:
        """Apply the round's mean gradient, leaving it in `keep`; the new parameters go to the spare
        buffer.
        """
        config, gradients, state = shard.config, shard.rounds.current.gradients, shard.state
        scalars = step_scalars(shard.progress.clock, config)
        rates = StepConstants(1.0 - config.beta_1, 1.0 - config.beta_2, config.clipvalue)
        for space, stepper in self._steppers.items():
            slots = Slots(state.params[space], state.m[space], state.v[space], state.spare[space])
            kept = None if keep is None else keep[space]
            stepper.step(
                slots,
                [g[space] for g in gradients],
                scalars,
                rates,
                self._parts(shard, space),
                kept,
            )
        return scalars.after, scalars.lr

    def _parts(self, shard: Shard, space: str) -> list[Part]:
        begin, end = self._spec.ranges[space]
        sums = shard.rounds.current.square_sums
        if sums is None:
            return [Part(0, end - begin)]
        scales = clip_scales(shard.config, sums)
        if len(set(scales)) <= 1:
            return [Part(0, end - begin, scales[0])]
        return [
            Part(s.begin - begin, s.end - begin, scales[s.tensor]) for s in self._segments[space]
        ]
