"""Ordinary rounds of one shard that follow each other, stepped and answered with as little between
their pushes and their answers as there can be, and counted later: by whoever next takes the lock of
the shard's machine, which `Outbox.settle` has do so first.

So nobody sees a machine that lacks a round which was answered. Nothing is decided here: what a
round must be for this, and how it is counted, `shard/ordinary.py` says, and a frame that is another
than the expected one goes the usual way.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

from distnadam.errors import DistNadamError
from distnadam.nadam.step_scalars import StepScalars, step_scalars
from distnadam.protocol.codec import pack
from distnadam.protocol.messages import Push
from distnadam.protocol.ordinary_frames import push_bodies, renumbered
from distnadam.protocol.supervisor_messages import ReplicatedRound
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.replicator import Replicator
from distnadam.runtime.shard_kernel import ShardKernel, StepsAhead
from distnadam.shard.effects import Replicate
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary import count_ahead, may_go_ahead

_ROUNDS = 16
"""Rounds that are prepared for at a time."""


def rounds_ahead(
    shard: Shard,
    outbox: Outbox,
    kernel: ShardKernel,
    replicator: Replicator,
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
        replicator: of its host.
        numbers: of the frames that the last round's pushes came in.
        pushes: the last round's, which those to come are like.
        on_step: called under the lock with the seconds of each step.
        on_error: called with what a step raised once it had begun.
    """
    stream = replicator.stream
    if stream is not None and stream.mean is not None:
        return None  # which the steps would have to leave for the standby
    if not outbox.may_begin or not may_go_ahead(shard, pushes):
        return None
    if (steps := kernel.steps_ahead(shard, pushes)) is None:
        return None
    found = RoundsAhead(shard, outbox, steps, numbers, pushes, replicator, on_step, on_error)
    outbox.put_off = found.count
    return found


class _Prepared(NamedTuple):
    """What is known of a round before its pushes come."""

    scalars: StepScalars
    answers: Sequence[bytes]


class RoundsAhead:
    """The rounds from the next on, until one is another or somebody takes the machine's lock.

    Args:
        steps: the rounds' steps.
        shard, outbox, numbers, pushes, replicator, on_step, on_error: as of `rounds_ahead`.
    """

    def __init__(
        self,
        shard: Shard,
        outbox: Outbox,
        steps: StepsAhead,
        numbers: Sequence[int],
        pushes: Sequence[Push],
        replicator: Replicator,
        on_step: Callable[[float], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._shard = shard
        self._outbox = outbox
        self._steps = steps
        self._pushes = pushes
        # what its frame's number is ahead of a push's round
        self._leads = [number - shard.progress.round for number in numbers]
        self._bodies = [push_bodies(push) for push in pushes]
        self._config = shard.config
        self._clock = shard.progress.clock
        self._active = shard.state.active
        self._lr = shard.progress.lr
        self._round = shard.progress.round
        self._rounds = 0  # that are not counted yet
        self._expected: deque[Sequence[bytes]] = deque()  # the frames of the next rounds
        self._prepared: deque[_Prepared] = deque()  # of the first of these
        progress = shard.progress
        self._result = replace(
            progress.result(want_parameters=False), outcome="applied", revision=progress.revision
        )
        self._replicator, self._stream = replicator, replicator.stream
        self._notes = {push.rank: push.note for push in pushes}
        self._on_step = on_step
        self._on_error = on_error

    def prepare(self) -> None:
        """Prepare all that can be known of the next round, if that is not done: of some rounds at a
        time, which costs less than of each by itself between two waits.
        """
        if not self._expected:
            self._expect()
        if not (self._prepared or callable(self._config.lr)):
            self._compute(len(self._expected))

    def _expect(self) -> None:
        following = self._round + 1
        for number in range(following, following + _ROUNDS):
            leads = zip(self._bodies, self._leads, strict=True)
            self._expected.append([body(number + lead, number) for body, lead in leads])

    def _compute(self, rounds: int) -> None:
        """Compute the scalars and the answers of the next rounds."""
        clock, active, result = self._clock, self._active, self._result
        following = self._round + 1
        for number in range(following, following + rounds):
            scalars = step_scalars(clock, self._config)
            clock, active = scalars.after, 1 - active
            result.round, result.iterations = number, clock.iterations
            result.lr, result.buffer = scalars.lr, active
            first, *others = self._leads
            answer = pack(number + first, result)
            answers = [answer, *[renumbered(answer, number + other) for other in others]]
            self._prepared.append(_Prepared(scalars, answers))

    def take(self, frames: Sequence[bytes]) -> Sequence[bytes] | None:
        """Step the next round, whose pushes came in these frames' bodies, and return the answers;
        None if they must go the usual way, where what was stepped all the same is counted already.
        """
        if not self._expected:
            self._expect()
        if frames != self._expected[0]:
            return None
        if not self._prepared:  # a function is asked for the rate when that is due
            try:
                self._compute(1)
            except DistNadamError:
                return None
        outbox, replicator = self._outbox, self._replicator
        if self._stream is not None:
            replicator.memory_for_mean()  # waits until the standby can take the round
        try:
            with outbox.lock:
                if outbox.put_off != self.count or replicator.stream is not self._stream:
                    return None
                return self._take() if outbox.may_begin else None
        except BaseException as error:
            self._on_error(error)
            return None

    def _take(self) -> Sequence[bytes] | None:
        scalars, answers = self._prepared[0]
        began = perf_counter()
        self._steps.step(self._active, scalars)
        self._on_step(perf_counter() - began)
        self._rounds += 1
        self._round += 1
        self._clock, self._lr = scalars.after, scalars.lr
        self._active = 1 - self._active
        self._prepared.popleft()
        self._expected.popleft()
        if self._stream is not None:
            self._replicator.replicate(Replicate(self._record()))
            if not self._outbox.may_begin:
                return None  # the standby was lost, and the supervisor is to know that first
        return answers

    def _record(self) -> ReplicatedRound:
        """Return what `Progress.record` would of the round that was stepped last."""
        for note in self._notes.values():
            note.round = self._round
        return ReplicatedRound(
            round=self._round,
            skipped=self._shard.progress.skipped,
            outcome="applied",
            rejection=None,
            counted=self._notes,
            lr=self._lr,
            active=self._active,
            clock=self._clock,
        )

    def count(self) -> None:
        """Count the rounds that were taken; no more are."""
        if self._rounds:
            count_ahead(self._shard, self._pushes, self._rounds, self._clock, self._lr)
