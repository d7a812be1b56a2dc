"""The state machine of one shard: messages in, effects out. No socket, file, clock, thread or Ray.

Everything that affects the machine's state lives in this folder, and it is changed by messages
only. The host calls, one at a time and under one lock, `receive` with a message of a worker, a
client or the supervisor, and `computed`, `refused` or `broke` when work that the machine asked for
has ended. Each returns effects, which the host carries out in order; an `Answer` names its caller.
A message that is refused changes nothing; one that is repeated, as its answer was lost, counts
once.

Phases (`phases.NEXT` has every change, and is checked at each):

    COLLECTING -- all pushed --> STEPPING -- stepped --> COLLECTING: the round is decided
    COLLECTING -- clipping needs norms --> MEASURING --> AWAITING_NORMS -- they came --> STEPPING

A rejected gradient, a norm that overflows, a rank's vote, settings in which ranks differ, or no
gradient of any tensor, end the round without a step. Between rounds the shard may stand still for
one client, which may read and write its state. A `Load` waits until nothing is computed and drops
the round; a copy to a standby waits for COLLECTING and keeps it. Meanwhile it is LOADING; a load
that failed leaves it EMPTY. BROKEN is final: work failed half-way, or others hold these ranges.

The parts know nothing of phases: `Rounds`, the `Round` in progress with its pushes and the callers
that wait for its end; `Progress`, the rounds decided so far, with `Membership` (who pushes) and
`Epochs` (which messages are out of date), as a standby has them; `ExclusiveHold`, who holds the
shard, and how far its rounds may go meanwhile; `LoadQueue`, the orders to load, or to copy to a
standby; `ShardState`, the arrays.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders
from distnadam.errors import DistNadamError, IllegalMessage, Reconfigured, ShardLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Description, ShardSpec
from distnadam.protocol.supervisor_events import RankDied, RankJoined, RankLeft
from distnadam.shard.effects import Answer, Compute, Effect, Notice, Replicate, Work
from distnadam.shard.epochs import Epochs
from distnadam.shard.exclusive_hold import ExclusiveHold
from distnadam.shard.ledger import DIRECT
from distnadam.shard.load_queue import LoadQueue
from distnadam.shard.membership import Membership
from distnadam.shard.phases import AT_REST, LEGAL, NEXT, Phase
from distnadam.shard.progress import Progress
from distnadam.shard.rounds import Rounds
from distnadam.shard.state import ShardState
from distnadam.shard.verdict import not_finite


class Shard:
    """The state machine of one shard; `phase` is the current one, changed by `enter` alone."""

    def __init__(self, spec: ShardSpec, state: ShardState) -> None:
        self.spec = spec
        self.config = spec.config
        self.state = state
        self.members = Membership(spec.index, spec.num_workers)
        self.epochs = Epochs()
        self.progress = Progress(self.members, self.epochs, state, spec.config.loss_scale)
        self.rounds = Rounds(spec, self.progress)
        self.exclusive_hold = ExclusiveHold()
        self.loads = LoadQueue(spec.index, self.progress)
        self._who = f"shard {spec.index}"
        self.phase = Phase.COLLECTING
        self._failure: DistNadamError | None = None
        self._handlers: dict[type, Callable[[Any, Any], list[Effect]]] = {
            msg.Join: self._join,
            msg.Push: self.rounds.push,
            msg.GroupPush: self.rounds.push_group,
            msg.CompletePush: self.rounds.complete_push,
            msg.TotalNorms: self.rounds.total_norms,
            msg.Pull: self._pull,
            msg.Leave: self._leave,
            msg.WorkerDied: self._worker_died,
            msg.Pause: self._pause,
            msg.CatchUp: self._catch_up,
            msg.Resume: self._resume,
            msg.Read: self._read,
            msg.Write: self._write,
            msg.SetConfig: self._set_config,
            msg.Step: self._step,
            msg.StepNorms: self._step_norms,
            orders.Reconfigure: self._reconfigure,
            orders.AbandonRank: self._abandon_rank,
            orders.Retire: self._retire,
            orders.Load: self.loads.add_load,
            orders.AttachStandby: self.loads.add_copy,
        }

    def enter(self, phase: Phase) -> None:
        """Change the phase, on behalf of this folder."""
        if phase not in NEXT[self.phase]:
            raise RuntimeError(f"{self._who}: {phase.name} cannot follow {self.phase.name}")
        self.phase = phase

    # What the host calls

    def receive(self, message: Any, caller: Any) -> list[Effect]:
        """Return a message's effects; raise a ProtocolError if it is refused: nothing changed."""
        kind = type(message)
        if kind not in LEGAL[self.phase]:
            if self._failure is not None:
                raise copy(self._failure) from self._failure.__cause__
            what = f"{kind.__name__} is not legal while {self.phase.value}"
            raise IllegalMessage(f"{self._who}: {what}")
        effects = self._handlers[kind](message, caller)
        return effects + self._advance()

    def computed(self, work: Work, result: Any) -> list[Effect]:
        """Take the result of the work asked for: for MEASURE the `PartialNorms`, for STEP the clock
        after it and its learning rate, for LOAD_OR_COPY the `ShardControlState` loaded, the round
        copied, or the error.
        """
        if self.phase is Phase.BROKEN:
            return []  # the shard was retired meanwhile
        if work is Work.LOAD_OR_COPY:
            effects = self._end_order(result)
        elif work is Work.MEASURE:
            effects = self._measured(result)
        else:
            clock, lr = result
            self.progress.take_step(clock, lr, self.rounds.current)
            effects = self._decide("applied", None)
        return effects + self._advance()

    def refused(self, error: DistNadamError) -> list[Effect]:
        """Take back a step that could not begin: fail the round's callers, and begin it again."""
        if self.phase is Phase.BROKEN:
            return []
        self.rounds.current.refusal = error
        return [*self._drop_round(error), *self._answer_due(), *self._advance()]

    def broke(self, error: BaseException) -> list[Effect]:
        """Mark the shard broken: fail all callers with `error`, and refuse later messages."""
        if self.phase is Phase.BROKEN:
            return []
        self.enter(Phase.BROKEN)
        self._failure = ShardLost(f"{self._who}: broken by {type(error).__name__}: {error}")
        self._failure.__cause__ = error
        rounds, loads = self.rounds.remove_callers(), self.loads.drain()
        return [Answer(c, error) for c in (*rounds, *loads, *self.exclusive_hold.drain())]

    def describe(self, *, with_spec: bool = False) -> Description:
        """Return the answer to `Describe`, but for what only the host knows."""
        return replace(
            self.progress.description(pushed=self.rounds.current.pushes, config=self.config),
            spec=replace(self.spec, config=self.config) if with_spec else None,
            phase=self.phase.value,
            holder=self.exclusive_hold.holder,
            busy=self.phase is Phase.LOADING,
            retired=isinstance(self._failure, Reconfigured),
        )

    # Messages of workers

    def _join(self, message: msg.Join, caller: Any) -> list[Effect]:
        needs_norms = self.phase in (Phase.MEASURING, Phase.AWAITING_NORMS)
        joined, effects = self.rounds.join(message, needs_norms=needs_norms)
        rank, incarnation = message.rank, joined.incarnation
        owner = None if message.reserve else message.process
        record = Replicate(orders.ReplicatedJoin(rank, incarnation, owner))
        notice = Notice(RankJoined(rank=rank, incarnation=incarnation))
        return [*effects, record, *([] if message.reserve else [notice]), Answer(caller, joined)]

    def _pull(self, pull: msg.Pull, caller: Any) -> list[Effect]:
        self.rounds.pull(pull, caller)
        return self._answer_due()

    def _leave(self, message: msg.Leave, caller: Any) -> list[Effect]:
        rank, incarnation = message.rank, message.incarnation
        self.members.leave(rank, incarnation)
        record = Replicate(orders.ReplicatedJoin(rank, incarnation))
        return [record, Notice(RankLeft(rank=rank, incarnation=incarnation)), Answer(caller, None)]

    def _worker_died(self, message: msg.WorkerDied, caller: Any) -> list[Effect]:
        rank, incarnation = message.rank, message.incarnation
        if self.phase is Phase.BROKEN or not self.members.lose(rank, incarnation):
            return [Answer(caller, None)]  # a worker that disconnects from a retired shard lives
        record = Replicate(orders.ReplicatedJoin(rank, incarnation))
        return [record, Notice(RankDied(rank=rank, incarnation=incarnation)), Answer(caller, None)]

    # Messages of clients that act on the optimizer as a whole

    def _pause(self, message: msg.Pause, caller: Any) -> list[Effect]:
        self.exclusive_hold.ask(caller, message.token)
        return self._answer_due()

    def _catch_up(self, message: msg.CatchUp, caller: Any) -> list[Effect]:
        self.require_hold(message.token)
        self.exclusive_hold.advance(caller, message.round)
        return self._answer_due()

    def _resume(self, message: msg.Resume, caller: Any) -> list[Effect]:
        was_held = self.exclusive_hold.holder == message.token
        withdrawn = self.exclusive_hold.release(message.token)
        if was_held and self.rounds.current.is_direct and self.phase in AT_REST:
            self._begin_round_again()  # its caller did not wait for the step's end
        error = IllegalMessage(f"{self._who}: the hold was given up")
        return [*(Answer(w, error) for w in withdrawn), Answer(caller, None), *self._answer_due()]

    def _read(self, message: msg.Read, caller: Any) -> list[Effect]:
        self.require_hold(message.token)
        arrays = self.state.arrays()
        return [Answer(caller, {name: arrays[name] for name in message.what or arrays})]

    def _write(self, message: msg.Write, caller: Any) -> list[Effect]:
        self.require_hold(message.token)
        self.state.write(message.state)
        if message.clock is not None:
            self.progress.clock = message.clock
        error = self.progress.next_epoch("replaced", message.epoch, self._who)
        return [Replicate(orders.DetachStandby()), *self._drop_round(error), Answer(caller, None)]

    def _set_config(self, message: msg.SetConfig, caller: Any) -> list[Effect]:
        self.require_hold(message.token)
        switches = message.config.clips_by_norm != self.config.clips_by_norm
        if switches and self.phase is Phase.AWAITING_NORMS:
            raise IllegalMessage(f"{self._who}: clipping is switched while a round awaits norms")
        return [self._take_config(message.config, message.revision), Answer(caller, None)]

    def _step(self, message: msg.Step, caller: Any) -> list[Effect]:
        if message.token is not None:
            self.require_hold(message.token)
        if self.rounds.is_counted(DIRECT, message):
            return [Answer(caller, self.progress.result(want_parameters=False))]
        if message.token is None:
            self.exclusive_hold.require_nobody(self.spec.index)
            self.rounds.require_untouched(message.epoch)
        effects = self.rounds.direct_step(message, caller)
        self.enter(Phase.COLLECTING)
        self.exclusive_hold.let_pass(message.round)
        return effects

    def _step_norms(self, message: msg.StepNorms, caller: Any) -> list[Effect]:
        self.require_hold(message.token)
        self.rounds.direct_norms(message, caller)
        return []

    def require_hold(self, token: str) -> None:
        """Raise IllegalMessage unless the caller with this token holds the shard."""
        self.exclusive_hold.require(token, self.spec.index)

    # Orders of the supervisor

    def _reconfigure(self, order: orders.Reconfigure, caller: Any) -> list[Effect]:
        if order.epoch <= self.epochs.now:
            return [Answer(caller, self.epochs.now)]
        self.progress.reconfigure(order)
        keep, answer = self.rounds.keep_members(), Answer(caller, self.epochs.now)
        effects = [*keep, Replicate(order)]
        if order.config is not None and order.revision > self.progress.revision:
            effects.append(self._take_config(order.config, order.revision))
        return [*effects, answer]

    def _take_config(self, config: NadamConfig, revision: int) -> Replicate:
        self.config = config
        self.progress.revision = revision
        return Replicate(self.progress.record_config(config))

    def _abandon_rank(self, order: orders.AbandonRank, caller: Any) -> list[Effect]:
        if not self.members.taken_over(order.rank, order.incarnation):
            self.members.given_up.add(order.rank)
        return [Answer(caller, None)]

    def _retire(self, order: orders.Retire, caller: Any) -> list[Effect]:
        error = Reconfigured(
            f"{self._who}: other shards hold its ranges now; look for them",
            order.epoch,
            self.progress.round,
        )
        answers = self.broke(error)
        self._failure = error
        return [*answers, Replicate(orders.DetachStandby()), Answer(caller, None)]

    # Rounds

    def _advance(self) -> list[Effect]:
        """Begin the next order, or go on with the round, as far as the host need not compute."""
        if self.members.given_up and (dropped := self._drop_abandoned_round()):
            return [*dropped, *self._advance()]
        if self.loads.entries and self._may_begin_order():
            return self._begin_order()
        number = self.progress.round + 1
        if number > self.exclusive_hold.limit:
            return []
        current = self.rounds.current
        if self.phase is Phase.COLLECTING and (
            current.pushes.keys() >= set(self.members.needed(number)) or DIRECT in current.pushes
        ):
            on_nonfinite = self.spec.options.on_nonfinite
            if not current.is_ordinary:
                if end := self.rounds.verdict(on_nonfinite):
                    return self._decide(*end)
                current.take_settings()
            current.is_closed = True
            clips = self.config.clips_by_norm
            self.enter(Phase.MEASURING if clips else Phase.STEPPING)
            return [Compute(Work.MEASURE if clips else Work.STEP)]
        if self.phase is Phase.AWAITING_NORMS and current.square_sums is not None:
            if (why := current.overflow(self.spec.layout)) is not None:
                return self._decide(*not_finite(why, self.spec.options.on_nonfinite))
            self.enter(Phase.STEPPING)
            return [Compute(Work.STEP)]
        return []

    def _measured(self, norms: msg.PartialNorms) -> list[Effect]:
        self.enter(Phase.AWAITING_NORMS)
        answers = self.rounds.current.measured(norms)
        if self.rounds.current.is_direct and self.exclusive_hold.holder is None:
            self._begin_round_again()  # its caller holds it no more, or never did
        return [*answers, *self._answer_due()]

    def _decide(self, outcome: msg.Outcome, rejection: str | None) -> list[Effect]:
        effects = self.rounds.decide(outcome, rejection)
        self.enter(Phase.COLLECTING)
        if self.rounds.pulls or self.exclusive_hold.queue or self.exclusive_hold.advances:
            effects += self._answer_due()
        return effects

    def _drop_round(self, error: DistNadamError) -> list[Effect]:
        effects = self.rounds.drop(error)
        self.enter(Phase.COLLECTING)
        return effects

    def _drop_abandoned_round(self) -> list[Effect]:
        error = self.rounds.abandoned() if self.phase is Phase.COLLECTING else None
        return [] if error is None else self._drop_round(error)

    def _begin_round_again(self) -> None:
        self.rounds.begin_again()
        self.enter(Phase.COLLECTING)

    def _answer_due(self) -> list[Effect]:
        """Answer the pulls, catch-ups and pauses whose time has come."""
        if self.phase in (Phase.LOADING, Phase.EMPTY):
            return []
        effects = self.rounds.ready_pulls()
        decided = self.progress.round
        effects += [Answer(caller, None) for caller in self.exclusive_hold.arrived(decided)]
        if self.phase in AT_REST:
            pending = tuple(sorted(self.rounds.current.pushes))
            awaits_norms = self.phase is Phase.AWAITING_NORMS
            for caller in self.exclusive_hold.admit(decided):
                paused = self.progress.paused(self.config, pending, awaits_norms=awaits_norms)
                effects.append(Answer(caller, paused))
        return effects

    # Loading and copying

    def _may_begin_order(self) -> bool:
        order = self.loads.first
        if isinstance(order, orders.Load):
            return self.phase in (*AT_REST, Phase.EMPTY)
        is_free = self.phase is Phase.COLLECTING and self.exclusive_hold.holder is None
        return order is not None and is_free

    def _begin_order(self) -> list[Effect]:
        if stale := self.loads.skip_stale():
            return [*stale, *self._advance()]
        order = self.loads.first
        effects: list[Effect] = []
        if isinstance(order, orders.Load):
            error = self.progress.next_epoch(order.reason, order.epoch, self._who)
            callers = [*self.rounds.remove_callers(), *self.exclusive_hold.reset()]
            effects = [Replicate(orders.DetachStandby()), *(Answer(c, error) for c in callers)]
        self.loads.begin()
        self.enter(Phase.LOADING)
        self._failure = None
        return [*effects, Compute(Work.LOAD_OR_COPY)]

    def _end_order(self, result: Any) -> list[Effect]:
        order, answer = self.loads.first, self.loads.end(result)
        if isinstance(order, orders.Load):
            if not isinstance(result, orders.ShardControlState):
                return [*self._become_empty(result), answer]
            self.config = order.config or self.config
        self.enter(Phase.COLLECTING)
        return [answer, *self._drop_abandoned_round(), *self._answer_due()]

    def _become_empty(self, cause: Any) -> list[Effect]:
        """Fail all callers but those of further loads: without a state nothing can be served."""
        self.enter(Phase.EMPTY)
        self._failure = ShardLost(f"{self._who}: is {self.phase.value}: {cause}")
        copies = self.loads.remove_copies()
        callers = [*self.rounds.remove_callers(), *copies, *self.exclusive_hold.reset()]
        return [Answer(caller, self._failure) for caller in callers]
