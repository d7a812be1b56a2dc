"""Ordinary rounds of one shard that follow each other, stepped and answered with as little between
their pushes and their answers as there can be, and counted later: by whoever next takes the lock of
the shard's machine, which `Outbox.settle` has do so first.

So nobody sees a machine that lacks a round which was answered. Nothing is decided here: what a
round must be for this, and how it is counted, `shard/ordinary.py` says, and a frame that is another
than the expected one goes the usual way.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

from distnadam.errors import DistNadamError
from distnadam.nadam.step_scalars import StepScalars, step_scalars
from distnadam.protocol.codec import pack
from distnadam.protocol.messages import Push
from distnadam.protocol.ordinary_frames import push_bodies, renumbered
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.shard_kernel import ShardKernel, StepsAhead
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary import count_ahead, may_go_ahead


def rounds_ahead(
    shard: Shard,
    outbox: Outbox,
    kernel: ShardKernel,
    numbers: Sequence[int],
    pushes: Sequence[Push],
    on_step: Callable[[float], None],
    on_error: Callable[[BaseException], None],
) -> "RoundsAhead | None":
    """Return the rounds from the next on, if they may be taken so; under the machine's lock.

    Args:
        shard: the machine.
        outbox: of its host.
        kernel: steps the rounds.
        numbers: of the frames that the last round's pushes came in.
        pushes: the last round's, which those to come are like.
        on_step: called under the lock with the seconds of each step.
        on_error: called with what a step raised once it had begun.
    """
    if not outbox.may_begin or not may_go_ahead(shard, pushes):
        return None
    if (steps := kernel.steps_ahead(shard, pushes)) is None:
        return None
    found = RoundsAhead(shard, outbox, steps, numbers, pushes, on_step, on_error)
    outbox.put_off = found.count
    return found


class RoundsAhead:
    """The rounds from the next on, until one is another or somebody takes the machine's lock.

    Args:
        steps: the rounds' steps.
        shard, outbox, numbers, pushes, on_step, on_error: as of `rounds_ahead`.
    """

    def __init__(
        self,
        shard: Shard,
        outbox: Outbox,
        steps: StepsAhead,
        numbers: Sequence[int],
        pushes: Sequence[Push],
        on_step: Callable[[float], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._shard = shard
        self._outbox = outbox
        self._steps = steps
        self._pushes = pushes
        self._numbers = list(numbers)
        self._bodies = [push_bodies(push) for push in pushes]
        self._config = shard.config
        self._clock = shard.progress.clock
        self._active = shard.state.active
        self._rounds = 0  # that are not counted yet
        self._scalars: StepScalars | None = None  # of the next
        progress = shard.progress
        self._result = replace(
            progress.result(want_parameters=False), outcome="applied", revision=progress.revision
        )
        self._on_step = on_step
        self._on_error = on_error

    def prepare(self) -> None:
        """Compute what the next step needs."""
        if not callable(self._config.lr):  # which is asked for the rate when it is due
            self._scalars = step_scalars(self._clock, self._config)

    def take(self, frames: Sequence[bytes]) -> Sequence[bytes] | None:
        """Step the next round, whose pushes came in these frames' bodies, and return the answers;
        None, with nothing changed, if they must go the usual way.
        """
        result = self._result
        number = result.round + 1
        for frame, body, last in zip(frames, self._bodies, self._numbers, strict=True):
            if frame != body(last + 1, number):
                return None
        outbox = self._outbox
        try:
            scalars = self._scalars or step_scalars(self._clock, self._config)
        except DistNadamError:
            return None
        error: BaseException | None = None
        with outbox.lock:
            if outbox.put_off != self.count or not outbox.may_begin:
                return None
            began = perf_counter()
            try:
                self._steps.step(self._active, scalars)
            except BaseException as raised:
                error = raised
            else:
                self._rounds += 1
                self._clock, self._scalars = scalars.after, None
                self._active = 1 - self._active
                self._on_step(perf_counter() - began)
        if error is not None:
            self._on_error(error)
            return None
        self._numbers = [last + 1 for last in self._numbers]
        result.round, result.iterations = number, scalars.after.iterations
        result.lr, result.buffer = scalars.lr, self._active
        first, *others = self._numbers
        answer = pack(first, result)
        return [answer, *[renumbered(answer, other) for other in others]]

    def count(self) -> None:
        """Count the rounds that were taken; no more are."""
        if self._rounds:
            count_ahead(self._shard, self._pushes, self._rounds, self._clock, self._result.lr)
