"""How one shard takes a round from pushes to its end: the state machine's frame. No socket, file,
clock, thread or Ray.

A round is collected, measured where clipping needs norms, stepped, and decided. Callers are opaque:
an effect hands back the one that is to be answered. What each message does is in `shard`.
"""

import math
from typing import Any

import distnadam.protocol.messages as msg
from distnadam.errors import DistNadamError, IllegalMessage, LatePush, Reconfigured, ShardLost
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol import supervisor_messages
from distnadam.shard.epochs import Epochs
from distnadam.shard.exclusive_hold import ExclusiveHold
from distnadam.shard.ledger import DIRECT
from distnadam.shard.membership import Membership
from distnadam.shard.phases import Answer, Compute, Effect, Phase, Replicate, Work
from distnadam.shard.round import Round, Waiter, note_of
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Flat

_AT_REST = (Phase.COLLECTING, Phase.AWAITING_NORMS)
_READY_TO_LOAD = (*_AT_REST, Phase.EMPTY)
_STATELESS = (Phase.LOADING, Phase.EMPTY)


class Machine:
    """The state of one shard, and the rounds; `Shard` adds the messages."""

    def __init__(self, spec: msg.ShardSpec, state: ShardState) -> None:
        self.spec, self.state = spec, state
        self.config, self.clock, self.members = (
            spec.config,
            Clock(),
            Membership(spec.index, spec.num_workers),
        )
        self.epochs, self.round, self.skipped, self.highest_round = Epochs(), 0, 0, 0
        self.phase = Phase.COLLECTING
        self.lr = 0.0
        self.changed: str | None = None
        self.exclusive_hold = ExclusiveHold()
        self._current = Round()
        self._last: tuple[msg.Outcome, str | None] = ("applied", None)
        self._counted: dict[int, msg.PushNote] = {}
        self._pulls: list[tuple[Any, msg.Pull]] = []
        self._orders: list[
            tuple[Any, supervisor_messages.Load | supervisor_messages.AttachStandby]
        ] = []
        self._loaded: tuple[int, Any] = (
            0,
            None,
        )  # the epoch of the last load, and how it was answered
        self._broken: BaseException | None = None
        self._why_hollow = ""
        self._refusal: DistNadamError | None = None  # why this round was begun anew

    # What the host may do

    def computed(self, work: Work, result: Any) -> list[Effect]:
        """Take the result of work asked for: `PartialNorms`, the pair (clock after the step, its
        learning rate), or what an order gave.
        """
        if work is Work.LOAD_OR_COPY:
            return [*self._obeyed(result), *self._settle(), *self._progress()]
        if work is Work.MEASURE:
            self._current.measured = result
            self.phase = Phase.AWAITING_NORMS
            answers = self._current.answer(result)
            if DIRECT in self._current.pushes and self.exclusive_hold.holder is None:
                self._current, self.phase = (
                    Round(),
                    Phase.COLLECTING,
                )  # who asked for the step is gone
            return [*answers, *self._settle(), *self._progress()]
        self.clock, self.lr = result
        self.state.swap()
        return [*self._decide("applied", None), *self._progress()]

    def broke(self, error: BaseException) -> list[Effect]:
        """Take that work failed half-way: whoever waits gets `error`, and the shard serves no one
        any more.
        """
        self.phase, self._broken = Phase.BROKEN, error
        waiting = [
            *(w.caller for w in self._current.waiting),
            *(caller for caller, _ in (*self._pulls, *self._orders)),
            *self.exclusive_hold.drain(),
        ]
        self._current, self._pulls, self._orders = Round(), [], []
        return [Answer(caller, error) for caller in waiting]

    def refused(self, error: DistNadamError) -> list[Effect]:
        """Take that a step could not be begun: nothing was touched, whoever waits gets the error,
        and the round begins anew.
        """
        self._refusal = error
        return [*self._drop_pushes(error), *self._settle(), *self._progress()]

    def gradients(self) -> list[Flat]:
        """Return the round's gradients in rank order."""
        return [
            g
            for _, push in sorted(self._current.pushes.items())
            if (g := push.gradients) is not None
        ]

    def square_sums(self) -> Any:
        """Return the whole model's sums of squares, where clipping by norm has them."""
        return self._current.square_sums

    @property
    def collecting(self) -> bool:
        """Whether the round may still get pushes."""
        return self.phase in (Phase.COLLECTING, Phase.LOADING)

    @property
    def retired(self) -> bool:
        """Whether other shards hold these ranges."""
        return isinstance(self._broken, Reconfigured)

    @property
    def pushed(self) -> frozenset[int]:
        """The ranks that have pushed for the coming round."""
        return frozenset(self._current.pushes)

    @property
    def order(self) -> supervisor_messages.Load | supervisor_messages.AttachStandby:
        """The order that is being obeyed."""
        return self._orders[0][1]

    @property
    def control_state(self) -> supervisor_messages.ShardControlState:
        """Where the shard stands, for a standby."""
        outcome, rejection = self._last
        return supervisor_messages.ShardControlState(
            epoch=self.epochs.now,
            round=self.round,
            skipped=self.skipped,
            clock=self.clock,
            lr=self.lr,
            active=self.state.active,
            outcome=outcome,
            rejection=rejection,
            ledger=self.members.ledger.to_dict(),
            schedule=self.members.schedule,
            changed=self.changed,
            history=self.epochs.history,
            counted=dict(self._counted),
            live_owners=self.members.live_owners,
            highest_round=self.highest_round,
        )

    # The round

    def _progress(self) -> list[Effect]:
        """Take the round as far as it goes without the host."""
        now = self._current
        if self._orders and self.phase in _READY_TO_LOAD:
            free = self.phase is Phase.COLLECTING and self.exclusive_hold.holder is None
            if free or isinstance(self.order, supervisor_messages.Load):
                return self._begin_order()
        if not self.exclusive_hold.passes(self.round):
            return []
        if self.phase is Phase.COLLECTING and (
            DIRECT in now.pushes or now.pushes.keys() >= set(self.members.needed(self.round + 1))
        ):
            complaints = [
                push.rejection
                for _, push in sorted(now.pushes.items())
                if push.rejection is not None
            ]
            if complaints:
                return self._refuse("; ".join(complaints))
            self.phase = Phase.MEASURING if self.config.clips_by_norm else Phase.STEPPING
            return [Compute(Work.MEASURE if self.config.clips_by_norm else Work.STEP)]
        if self.phase is Phase.AWAITING_NORMS and now.square_sums is not None:
            for tensor, total in zip(self.spec.layout.tensors, now.square_sums, strict=True):
                if not math.isfinite(total):
                    return self._refuse(
                        f"the norm of the mean gradient of {tensor.path!r} overflows"
                    )
            self.phase = Phase.STEPPING
            return [Compute(Work.STEP)]
        return []

    def _drop_pushes_that_wait_in_vain(self) -> list[Effect]:
        error = self.members.given_up_of(self.round + 1, set(self._current.pushes))
        if (
            error is None
            or self.phase is not Phase.COLLECTING
            or DIRECT in self._current.pushes
            or self._current.adopted
        ):
            return []
        return self._drop_pushes(error)

    def _drop_pushes(self, error: DistNadamError) -> list[Effect]:
        """Begin the round anew; whoever waited for it gets the error."""
        refused = self._current.refuse(error)
        self._current, self.phase = Round(), Phase.COLLECTING
        return refused

    def _refuse(self, rejection: str) -> list[Effect]:
        return self._decide(
            "skipped" if self.spec.options.on_nonfinite == "skip" else "refused", rejection
        )

    def _decide(self, outcome: msg.Outcome, rejection: str | None) -> list[Effect]:
        """End the round: count its pushes, tell the standby, answer who waits, begin the next."""
        self.round, self._refusal = self.round + 1, None
        self.highest_round = max(self.highest_round, self.round)
        self.skipped += outcome != "applied"
        self._last = (outcome, rejection)
        for rank, push in self._current.pushes.items():
            self.members.ledger.count(rank, push.incarnation, self.round)
            self._counted[rank] = note_of(push)
        ended, self._current, self.phase = self._current, Round(), Phase.COLLECTING
        counted = {rank: self._counted[rank] for rank in ended.pushes}
        record = supervisor_messages.ReplicatedRound(
            round=self.round,
            skipped=self.skipped,
            outcome=outcome,
            rejection=rejection,
            counted=counted,
            lr=self.lr,
            active=self.state.active,
            clock=self.clock,
        )
        told = [Answer(w.caller, self._told(w, ended.pushes.get(w.rank))) for w in ended.waiting]
        return [Replicate(record), *told, *self._settle()]

    def _told(self, waiting: Waiter, counted: msg.Push | None) -> msg.RoundResult | LatePush:
        """Say how the round ended to one who waited for it, unless another worker's push was
        counted for its rank.
        """
        if counted is None or counted.incarnation != waiting.incarnation:
            other = (
                "without this rank"
                if counted is None
                else f"with the push of worker {counted.incarnation}"
            )
            return LatePush(
                f"shard {self.spec.index}: rank {waiting.rank}: round {self.round} was completed "
                f"{other}; this push did not count"
            )
        return self._decided(waiting.want_parameters)

    def _settle(self) -> list[Effect]:
        """Answer the pulls, advances and holds whose time has come."""
        if self.phase in _STATELESS:
            return []
        ready = [(caller, pull) for caller, pull in self._pulls if pull.at_least <= self.round]
        self._pulls = [x for x in self._pulls if x[1].at_least > self.round]
        effects: list[Effect] = [
            Answer(caller, self._decided(pull.want_parameters)) for caller, pull in ready
        ]
        effects += [Answer(caller, None) for caller in self.exclusive_hold.arrived(self.round)]
        if self.phase in _AT_REST:
            effects += [
                Answer(caller, self._held()) for caller in self.exclusive_hold.admit(self.round)
            ]
        return effects

    # Orders

    def _begin_order(self) -> list[Effect]:
        """Give the next order to the host; one that loads ends the round first."""
        told: list[Effect] = []
        caller, order = self._orders[0]
        if isinstance(order, supervisor_messages.Load):
            before, who = self.epochs.now, f"shard {self.spec.index}"
            if order.epoch <= before > 0:
                del self._orders[0]
                refused = IllegalMessage(
                    f"{who}: a load of epoch {order.epoch} came in epoch {before}"
                )
                return [
                    Answer(caller, self._loaded[1] if order.epoch == self._loaded[0] else refused),
                    *self._progress(),
                ]
            self.epochs.advance(
                "reconfigured" if order.control_state is not None else "rewound", order.epoch
            )
            error = self.epochs.refusal(before, who, self.round)
            assert error is not None
            told = [Replicate(supervisor_messages.DetachStandby()), *self._drop_pushes(error)]
            told += [
                Answer(caller, error)
                for caller in (*self.exclusive_hold.reset(), *(caller for caller, _ in self._pulls))
            ]
            self._pulls = []
        self.phase = Phase.LOADING
        return [*told, Compute(Work.LOAD_OR_COPY)]

    def _obeyed(self, result: Any) -> list[Effect]:
        """Take what the host made of an order: an error, or for a load the place in time that it
        loaded.
        """
        caller, order = self._orders.pop(0)
        if isinstance(order, supervisor_messages.Load) and not isinstance(
            result, supervisor_messages.ShardControlState
        ):
            self._loaded = order.epoch, result
            return [*self._hollowed(result), Answer(caller, result)]
        self.phase = Phase.COLLECTING
        if isinstance(order, supervisor_messages.Load) and isinstance(
            result, supervisor_messages.ShardControlState
        ):
            self._stand(result)
            if order.control_state is not None:
                self.epochs.restore((*result.history, (order.epoch, "reconfigured")))
            self.members.schedule = order.schedule or self.members.schedule
            self.members.ledger.admit_all(order.newest)
            self.members.owners = {**order.live_owners, **self.members.owners}
            self.highest_round = max(self.highest_round, self.round, order.highest_round)
            if order.lr is not None:
                self.config = self.config.with_lr(order.lr)
            result = self.round
            self._loaded = order.epoch, result
        return [Answer(caller, result)]

    def _hollowed(self, cause: Any) -> list[Effect]:
        """Take that loading failed half-way: there is nothing to serve until another load; who
        waits is told so.
        """
        self.phase, self._why_hollow = Phase.EMPTY, str(cause)
        error = ShardLost(f"shard {self.spec.index}: is {self.phase.value}: {cause}")
        attaches = [
            caller
            for caller, order in self._orders
            if isinstance(order, supervisor_messages.AttachStandby)
        ]
        self._orders = [x for x in self._orders if isinstance(x[1], supervisor_messages.Load)]
        waiting = [
            *(w.caller for w in self._current.waiting),
            *(caller for caller, _ in self._pulls),
            *attaches,
            *self.exclusive_hold.reset(),
        ]
        self._current, self._pulls = Round(), []
        return [Answer(caller, error) for caller in waiting]

    def take_over(
        self,
        control_state: supervisor_messages.ShardControlState,
        reconfigure: supervisor_messages.Reconfigure,
    ) -> None:
        """Stand where a primary stood, under the epoch in which it is gone; its arrays are in the
        state.
        """
        self._stand(control_state)
        self.epochs.restore(control_state.history)
        self.epochs.advance("reconfigured", max(reconfigure.epoch, control_state.epoch + 1))
        self.members.schedule = reconfigure.schedule or self.members.schedule
        self.members.ledger.admit_all(reconfigure.newest)

    def _stand(self, control_state: supervisor_messages.ShardControlState) -> None:
        self.clock, self.round, self.skipped, self.lr = (
            control_state.clock,
            control_state.round,
            control_state.skipped,
            control_state.lr,
        )
        known = self.members.ledger.newest_of_all()
        self.members.ledger = self.members.ledger.from_dict(control_state.ledger)
        self.members.ledger.admit_all(known)  # a number that was given away is never given again
        self.members.schedule = control_state.schedule or self.members.schedule
        self._last, self._counted, self.changed = (
            (control_state.outcome, control_state.rejection),
            dict(control_state.counted),
            control_state.changed,
        )
        self.members.owners = {**control_state.live_owners, **self.members.owners}
        self.highest_round = max(
            self.highest_round, control_state.highest_round, control_state.round
        )

    # What it says of itself

    def _held(self) -> msg.Paused:
        return msg.Paused(
            epoch=self.epochs.now,
            round=self.round,
            clock=self.clock,
            skipped=self.skipped,
            lr=self.config.lr,
            pending=tuple(sorted(self._current.pushes)),
            ledger=self.members.ledger.to_dict(),
            rewound=self.epochs.rewound,
        )

    def _decided(self, want_parameters: bool) -> msg.RoundResult:
        outcome, rejection = self._last
        return msg.RoundResult(
            epoch=self.epochs.now,
            round=self.round,
            iterations=self.clock.iterations,
            outcome=outcome,
            rejection=rejection,
            lr=self.lr,
            buffer=self.state.active,
            parameters=self.state.params if want_parameters else None,
            rewound=self.epochs.rewound,
        )
