"""Ordinary rounds of one shard that one message of its own process each makes up, the only member's
push or a direct step: as `rounds_ahead` has those that come in frames.
"""

import weakref
from collections import deque
from collections.abc import Callable
from operator import call, is_not
from time import perf_counter
from typing import Any

from distnadam.nadam.step_scalars import StepScalars, step_scalars
from distnadam.protocol.messages import Push, RoundResult, Step
from distnadam.runtime.outbox import Outbox
from distnadam.runtime.replicator import Replicator
from distnadam.runtime.shard_host import ShardHost
from distnadam.runtime.shard_kernel import ShardKernel, StepsAhead
from distnadam.shard.ledger import DIRECT
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary import continues, count_ahead, may_go_ahead

_STEPS = 16
"""Steps whose scalars are computed at a time."""


class RoundsAlone:
    """The rounds of one host that are each ended by one message of its own process; they are gone
    ahead with where such messages follow each other.

    Args:
        host: the shard's.
    """

    def __init__(self, host: ShardHost) -> None:
        self._host = host
        self._ahead: AloneAhead | None = None
        # of the last message; keeps none of them alive
        self._gradients: list[weakref.ref[Any]] = []

    def step_at_once(self, message: Push | Step) -> RoundResult | None:
        """As `ShardHost.step_at_once`."""
        if (ahead := self._ahead) is not None:
            if (result := ahead.take(message)) is not None:
                return result
            self._ahead = None
        result = self._host.step_at_once(message)
        arrays = [] if result is None else [*(message.gradients or {}).values()]
        is_known = arrays != [] and len(arrays) == len(self._gradients)
        if is_known and not any(map(is_not, map(call, self._gradients), arrays)):
            self._ahead = self._host.go_ahead_by(alone_ahead, message)
        self._gradients = [*map(weakref.ref, arrays)]
        return result

    def stop(self) -> None:
        """Have the rounds counted that went ahead; none does until the next message."""
        self._ahead = None
        self._host.go_ahead_by(_not_at_all)


def _not_at_all(*of: Any) -> None:
    """Prepare nothing."""


def alone_ahead(
    shard: Shard,
    outbox: Outbox,
    kernel: ShardKernel,
    replicator: Replicator,
    last: Push | Step,
    on_step: Callable[[float], None],
    on_error: Callable[[BaseException], None],
) -> "AloneAhead | None":
    """Return the rounds from the next on, if they may be taken so; under the machine's lock.

    Args:
        shard: the machine.
        outbox: of its host.
        kernel: steps the rounds.
        replicator: of its host.
        last: made up the last round, and those to come are like it.
        on_step: called under the lock with the seconds of each step.
        on_error: called with what a step raised once it had begun.
    """
    if callable(shard.config.lr) or replicator.stream is not None:
        return None  # what must be done at each round
    if not outbox.may_begin or not may_go_ahead(shard, [last]):
        return None
    push, in_place = last, False
    if isinstance(push, Step):
        in_place = shard.rounds.is_in_place(push)
        push = Push(
            epoch=push.epoch,
            rank=DIRECT,
            incarnation=push.incarnation,
            round=push.round,
            gradients=push.gradients,
        )
    if (steps := kernel.steps_ahead(shard, [push], in_place=in_place)) is None:
        return None
    found = AloneAhead(shard, outbox, steps, last, on_step, on_error)
    outbox.put_off = found.count
    return found


class AloneAhead:
    """The rounds from the next on, until one is another or somebody takes the machine's lock.

    Args:
        steps: the rounds' steps.
        shard, outbox, last, on_step, on_error: as of `alone_ahead`.
    """

    def __init__(
        self,
        shard: Shard,
        outbox: Outbox,
        steps: StepsAhead,
        last: Push | Step,
        on_step: Callable[[float], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._shard = shard
        self._outbox = outbox
        self._steps = steps
        self._last = last
        self._on_step = on_step
        self._on_error = on_error
        self._config = shard.config
        self._clock = shard.progress.clock
        self._active = shard.state.active
        self._rounds = 0  # that are not counted yet
        self._scalars: deque[StepScalars] = deque()  # of the next steps
        self._lr = 0.0

    def take(self, message: Push | Step) -> RoundResult | None:
        """Step the next round, which a message makes up, and return its end, or raise what its step
        raises; None if it must go the usual way.
        """
        outbox = self._outbox
        try:
            with outbox.lock:
                if outbox.put_off != self.count or not continues(self._last, message):
                    return None
                self._step()
                self._last = message
                progress = self._shard.progress
                return RoundResult(
                    epoch=progress.epochs.now,
                    round=message.round,
                    iterations=self._clock.iterations,
                    outcome="applied",
                    rejection=None,
                    lr=self._lr,
                    buffer=self._active,
                    rewound=progress.epochs.rewound,
                    revision=progress.revision,
                )
        except BaseException as error:
            self._on_error(error)
            raise

    def _step(self) -> None:
        if not self._scalars:
            clock = self._clock
            for _ in range(_STEPS):
                self._scalars.append(step_scalars(clock, self._config))
                clock = self._scalars[-1].after
        began, scalars = perf_counter(), self._scalars[0]
        self._steps.step(self._active, scalars)
        self._on_step(perf_counter() - began)
        self._scalars.popleft()
        self._rounds += 1
        self._clock, self._lr = scalars.after, scalars.lr
        self._active = self._steps.follows[self._active]

    def count(self) -> None:
        """Count the rounds that were taken; no more are."""
        if self._rounds:
            count_ahead(self._shard, [self._last], self._rounds, self._clock, self._lr)
