"""One shard as a state machine: messages in, effects out. No socket, file, clock, thread or Ray.

`LEGAL` says which message may come in which phase; one that is refused raises and changes nothing.
How a round goes on is in `machine`.
"""

from collections.abc import Callable
from typing import Any

import distnadam.protocol.messages as msg
from distnadam.errors import IllegalMessage, LatePush, Reconfigured, RoundMismatch, ShardLost
from distnadam.protocol import supervisor_messages
from distnadam.protocol.shard_status import Description
from distnadam.protocol.supervisor_events import RankDied, RankJoined, RankLeft
from distnadam.shard.ledger import DIRECT
from distnadam.shard.phases import LEGAL, Answer, Effect, Notice, Phase, Replicate
from distnadam.shard.round import Round, Waiter, note_of
from distnadam.shard.round_lifecycle import Machine


def described(shard: Machine, *, with_spec: bool = False) -> Description:
    """Return what `Describe` is answered."""
    members, needed = shard.members, shard.members.needed(shard.round + 1)
    return Description(
        spec=shard.spec if with_spec else None,
        epoch=shard.epochs.now,
        round=shard.round,
        iterations=shard.clock.iterations,
        skipped=shard.skipped,
        phase=shard.phase.value,
        waiting_for=tuple(rank for rank in needed if rank not in shard.pushed),
        left=tuple(sorted(members.left)),
        dead=tuple(sorted(members.dead)),
        members=needed,
        holder=shard.exclusive_hold.holder,
        busy=shard.phase is Phase.LOADING,
        lr=shard.config.lr,
        epoch_reason=shard.epochs.reason,
        schedule=members.schedule,
        newest=members.ledger.newest_of_all(),
        changed=shard.changed,
        given_up=tuple(sorted(members.given_up)),
        retired=shard.retired,
        live_owners=members.live_owners,
        highest_round=shard.highest_round,
        stepped=members.ledger.last(DIRECT),
    )


class Shard(Machine):
    """The state machine of one shard; the host calls `receive` and `computed` one at a time."""

    def receive(self, message: Any, caller: Any) -> list[Effect]:
        """Take one message; return what is to be done. Raise a ProtocolError, with nothing changed,
        where it is refused.
        """
        if isinstance(self._broken, Reconfigured) and type(message) not in LEGAL[Phase.BROKEN]:
            raise self._broken
        if self._broken is not None and type(message) not in LEGAL[Phase.BROKEN]:
            raise ShardLost(
                f"shard {self.spec.index}: broken by {type(self._broken).__name__}: {self._broken}"
            ) from self._broken
        if self.phase is Phase.EMPTY and type(message) not in LEGAL[Phase.EMPTY]:
            raise ShardLost(f"shard {self.spec.index}: is {self.phase.value}: {self._why_hollow}")
        if type(message) not in LEGAL[self.phase]:
            raise IllegalMessage(
                f"shard {self.spec.index}: {type(message).__name__} is not legal while "
                f"{self.phase.value}"
            )
        handler = _HANDLERS[type(message)]
        return [*handler(self, message, caller), *self._progress()]

    # Workers

    def _on_join(self, message: msg.Join, caller: Any) -> list[Effect]:
        committed = self._counted.get(message.rank)
        if message.rank in self._current.pushes and (
            not self.collecting or message.rank in self._current.adopted
        ):
            committed = note_of(self._current.pushes[message.rank])
        incarnation = self.members.join(message)
        if self.collecting:
            self._current.set_aside(message.rank, incarnation)
        joined = RankJoined(rank=message.rank, incarnation=incarnation)
        notices = [] if message.reserve else [Notice(joined)]
        record = Replicate(
            supervisor_messages.ReplicatedJoin(
                message.rank, incarnation, None if message.reserve else message.process
            )
        )
        member = message.rank in self.members.needed(self.round + 1)
        return [
            record,
            *notices,
            Answer(
                caller,
                msg.Joined(
                    incarnation=incarnation,
                    round=self.round,
                    committed=committed,
                    member=member,
                    orphaned=self._is_orphaned(),
                ),
            ),
        ]

    def _is_orphaned(self) -> bool:
        """Whether nobody who pushed is still there to send the norms that are awaited, or will
        be.
        """
        pushes, measured = (
            self._current.pushes.items(),
            self.phase in (Phase.MEASURING, Phase.AWAITING_NORMS),
        )
        return measured and all(
            push.incarnation < self.members.ledger.newest(rank) for rank, push in pushes
        )

    def _on_complete_push(self, message: msg.CompletePush, caller: Any) -> list[Effect]:
        rank, note = message.rank, message.note
        who = f"shard {self.spec.index}: rank {rank}"
        counted = (
            self.members.ledger.counted(rank, note.incarnation, note.round)
            and note.round <= self.round
        )
        if counted or (not self.collecting and rank in self._current.pushes):
            return [Answer(caller, None)]
        if note.round != self.round + 1:
            raise RoundMismatch(
                f"{who}: round {note.round} is to be completed, expected round {self.round + 1}"
            )
        if not self._current.restore(rank, note.incarnation):
            if message.gradients is None and note.rejection is None:
                raise IllegalMessage(
                    f"{who}: the push of worker {note.incarnation} for round {note.round} cannot "
                    "be had any more"
                )
            push = msg.Push(
                epoch=self.epochs.now,
                rank=rank,
                incarnation=note.incarnation,
                round=note.round,
                gradients=message.gradients,
                rejection=note.rejection,
            )
            self._current.adopted.add(rank)
            return [*self._current.supersede(push, self.spec.index), Answer(caller, None)]
        self._current.adopted.add(rank)
        return [Answer(caller, None)]

    def _on_push(self, push: msg.Push, caller: Any) -> list[Effect]:
        if self.members.already_counted(push, self.round):
            return [Answer(caller, self._decided(push.want_parameters))]
        self.members.check_current(push, self.epochs, self.round)
        waiting, held = (
            Waiter(caller, push.rank, push.incarnation, push.want_parameters),
            self._current.pushes.get(push.rank),
        )
        if not self.collecting:  # the round has all its pushes, but may need this worker's norms
            if self._current.measured is not None:
                return [Answer(caller, self._current.measured)]
            self._current.waiting.append(waiting)
            return []
        superseded: list[Effect] = []
        if held is None or (
            held.incarnation < push.incarnation and push.rank not in self._current.adopted
        ):
            superseded = self._current.supersede(push, self.spec.index)
        self._current.waiting.append(waiting)
        return [*superseded, *self._drop_pushes_that_wait_in_vain()]

    def _on_total_norms(self, message: msg.TotalNorms, caller: Any) -> list[Effect]:
        if self.members.already_counted(message, self.round):
            return [Answer(caller, self._decided(message.want_parameters))]
        self.members.check_current(message, self.epochs, self.round)
        if message.rank not in self._current.pushes and self._refusal is not None:
            raise self._refusal  # the round that was measured was begun anew
        return self._take_norms(
            message.square_sums,
            Waiter(caller, message.rank, message.incarnation, message.want_parameters),
        )

    def _on_pull(self, pull: msg.Pull, caller: Any) -> list[Effect]:
        self.members.check_newest(pull.rank, pull.incarnation)
        refusal = (
            self.epochs.refusal(pull.epoch, f"shard {self.spec.index}", self.round)
            if pull.at_least
            else None
        )
        if refusal is not None and not isinstance(refusal, Reconfigured):
            raise refusal  # that round may never come
        self._pulls.append((caller, pull))
        return self._settle()

    def _on_leave(self, message: msg.Leave, caller: Any) -> list[Effect]:
        self.members.leave(message.rank, message.incarnation)
        gone = Replicate(supervisor_messages.ReplicatedJoin(message.rank, message.incarnation))
        left = RankLeft(rank=message.rank, incarnation=message.incarnation)
        return [gone, Notice(left), Answer(caller, None)]

    def _on_worker_died(self, message: msg.WorkerDied, caller: Any) -> list[Effect]:
        if self._broken is not None or not self.members.lose(message.rank, message.incarnation):
            return [
                Answer(caller, None)
            ]  # whoever hangs up on a shard that was retired has not died
        gone = Replicate(supervisor_messages.ReplicatedJoin(message.rank, message.incarnation))
        died = RankDied(rank=message.rank, incarnation=message.incarnation)
        return [gone, Notice(died), Answer(caller, None)]

    # Whoever acts on the optimizer as a whole

    def _on_pause(self, message: msg.Pause, caller: Any) -> list[Effect]:
        self.exclusive_hold.ask(caller, message.token)
        return self._settle()

    def _on_catch_up(self, message: msg.CatchUp, caller: Any) -> list[Effect]:
        self.exclusive_hold.require(message.token, self.spec.index)
        self.exclusive_hold.advance(caller, message.round)
        return self._settle()

    def _on_resume(self, message: msg.Resume, caller: Any) -> list[Effect]:
        held = self.exclusive_hold.holder == message.token
        given_up = self.exclusive_hold.release(message.token)
        if (
            held
            and DIRECT in self._current.pushes
            and self.phase in (Phase.COLLECTING, Phase.AWAITING_NORMS)
        ):
            self._current, self.phase = (
                Round(),
                Phase.COLLECTING,
            )  # a step that its caller did not see through
        refused: list[Effect] = [
            Answer(c, IllegalMessage(f"shard {self.spec.index}: the hold was given up"))
            for c in given_up
        ]
        return [*refused, Answer(caller, None), *self._settle()]

    def _on_read(self, message: msg.Read, caller: Any) -> list[Effect]:
        self.exclusive_hold.require(message.token, self.spec.index)
        arrays = self.state.arrays()
        return [Answer(caller, {name: arrays[name] for name in message.what})]

    def _on_write(self, message: msg.Write, caller: Any) -> list[Effect]:
        self.exclusive_hold.require(message.token, self.spec.index)
        self.state.write(message.state)
        if message.clock is not None:
            self.clock = message.clock
        before, self.changed = self.epochs.now, f"the state was replaced after round {self.round}"
        self.epochs.advance("replaced", message.epoch)
        refusal = self.epochs.refusal(before, f"shard {self.spec.index}", self.round)
        assert refusal is not None
        return [
            Replicate(supervisor_messages.DetachStandby()),
            *self._drop_pushes(refusal),
            Answer(caller, None),
        ]

    def _on_set_rate(self, message: msg.SetRate, caller: Any) -> list[Effect]:
        self.exclusive_hold.require(message.token, self.spec.index)
        self.config = self.config.with_lr(message.lr)
        self.changed = f"the learning rate was replaced after round {self.round}"
        return [Replicate(supervisor_messages.DetachStandby()), Answer(caller, None)]

    def _on_step(self, message: msg.Step, caller: Any) -> list[Effect]:
        """Take the round for a step from outside; a push that came since the holder looked is
        late.
        """
        self.exclusive_hold.require(message.token, self.spec.index)
        if (
            self.members.ledger.counted(DIRECT, message.incarnation, message.round)
            and message.round <= self.round
        ):
            return [Answer(caller, self._decided(want_parameters=False))]
        if message.round != self.round + 1:
            raise RoundMismatch(
                f"shard {self.spec.index}: expected a step for round {self.round + 1}, got one for "
                f"round {message.round}"
            )
        late = LatePush(
            f"shard {self.spec.index}: round {self.round + 1} was taken by apply_gradients; pull "
            "and push for the next"
        )
        dropped = self._drop_pushes(late)
        self.exclusive_hold.limit(self.round + 1)
        incarnation = self.members.ledger.admit(DIRECT, message.incarnation)
        push = msg.Push(
            epoch=self.epochs.now,
            rank=DIRECT,
            incarnation=incarnation,
            round=self.round + 1,
            gradients=message.gradients,
            rejection=message.rejection,
        )
        self._current.pushes[DIRECT] = push
        self._current.waiting.append(Waiter(caller, DIRECT, incarnation))
        return dropped

    def _on_step_norms(self, message: msg.StepNorms, caller: Any) -> list[Effect]:
        self.exclusive_hold.require(message.token, self.spec.index)
        return self._take_norms(
            message.square_sums, Waiter(caller, DIRECT, self.members.ledger.newest(DIRECT))
        )

    def _on_describe(self, message: msg.Describe, caller: Any) -> list[Effect]:
        return [Answer(caller, described(self, with_spec=message.spec))]

    # The supervisor

    def _on_reconfigure(self, order: supervisor_messages.Reconfigure, caller: Any) -> list[Effect]:
        if order.epoch <= self.epochs.now:
            return [Answer(caller, self.epochs.now)]
        self.epochs.advance("reconfigured", order.epoch)
        self.members.schedule = order.schedule
        self.members.ledger.admit_all(order.newest)
        if self.collecting:
            needed = {DIRECT, *self.members.needed(self.round + 1)}
            self._current.pushes = {
                rank: push for rank, push in self._current.pushes.items() if rank in needed
            }
        return [Replicate(order), Answer(caller, self.epochs.now)]

    def _on_abandon_rank(self, order: supervisor_messages.AbandonRank, caller: Any) -> list[Effect]:
        if self.members.taken_over(order.rank, order.incarnation):
            return [Answer(caller, None)]  # somebody has taken it over after all
        self.members.given_up.add(order.rank)
        return [Answer(caller, None), *self._drop_pushes_that_wait_in_vain()]

    def _on_retire(self, order: supervisor_messages.Retire, caller: Any) -> list[Effect]:
        error = Reconfigured(
            f"shard {self.spec.index}: other shards hold its ranges now; look for them",
            order.epoch,
            self.round,
        )
        return [
            *self.broke(error),
            Replicate(supervisor_messages.DetachStandby()),
            Answer(caller, None),
        ]

    def _on_load(self, order: supervisor_messages.Load, caller: Any) -> list[Effect]:
        if order.epoch == self._loaded[0]:
            return [Answer(caller, self._loaded[1])]  # asked again, since the answer was lost
        loading = (
            self.phase is Phase.LOADING
            and isinstance(self.order, supervisor_messages.Load)
            and self.order.epoch == order.epoch
        )
        if order.epoch <= self.epochs.now and self.epochs.now > 0 and not loading:
            raise IllegalMessage(
                f"shard {self.spec.index}: a load of epoch {order.epoch} came in epoch "
                f"{self.epochs.now}"
            )
        begun = self._orders[:1] if self.phase is Phase.LOADING else []
        rest = self._orders[len(begun) :]
        loads = [entry for entry in rest if isinstance(entry[1], supervisor_messages.Load)]
        copies = [
            entry for entry in rest if isinstance(entry[1], supervisor_messages.AttachStandby)
        ]  # which may wait for a round that will never end
        self._orders = [*begun, *loads, (caller, order), *copies]
        return []

    def _on_attach_standby(
        self, order: supervisor_messages.AttachStandby, caller: Any
    ) -> list[Effect]:
        self._orders.append((caller, order))
        return []

    # Checks

    def _take_norms(self, square_sums: Any, waiting: Waiter) -> list[Effect]:
        if self._current.measured is None or waiting.rank not in self._current.pushes:
            raise IllegalMessage(f"shard {self.spec.index}: norms came while {self.phase.value}")
        self._current.waiting.append(waiting)
        self._current.square_sums = square_sums
        return []


_HANDLERS: dict[type, Callable[[Shard, Any, Any], list[Effect]]] = {
    msg.Join: Shard._on_join,
    msg.CompletePush: Shard._on_complete_push,
    msg.Push: Shard._on_push,
    msg.TotalNorms: Shard._on_total_norms,
    msg.Pull: Shard._on_pull,
    msg.Leave: Shard._on_leave,
    msg.WorkerDied: Shard._on_worker_died,
    msg.Pause: Shard._on_pause,
    msg.CatchUp: Shard._on_catch_up,
    msg.Resume: Shard._on_resume,
    msg.Read: Shard._on_read,
    msg.Write: Shard._on_write,
    msg.SetRate: Shard._on_set_rate,
    msg.Step: Shard._on_step,
    msg.StepNorms: Shard._on_step_norms,
    msg.Describe: Shard._on_describe,
    supervisor_messages.Reconfigure: Shard._on_reconfigure,
    supervisor_messages.AbandonRank: Shard._on_abandon_rank,
    supervisor_messages.Retire: Shard._on_retire,
    supervisor_messages.Load: Shard._on_load,
    supervisor_messages.AttachStandby: Shard._on_attach_standby,
}
