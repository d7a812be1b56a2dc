"""One shard as a state machine: messages in, effects out. No socket, file, clock, thread or Ray.

A round is collected, measured where clipping needs norms, stepped, and decided; `LEGAL` says which message may come in which phase,
and one that is refused raises and changes nothing. Callers are opaque: an effect hands back the one that is to be answered.
"""

import math
from typing import Any

import distnadam.messages as msg
from distnadam.arrays import Flat
from distnadam.errors import (
    DistNadamError,
    IllegalMessage,
    LatePush,
    ShardLost,
    StaleEpoch,
    WorkerLost,
)
from distnadam.gate import Gate
from distnadam.ledger import DIRECT, Ledger
from distnadam.members import Members
from distnadam.nadam.schedule import Clock
from distnadam.rounds import Round, Waiting
from distnadam.state import ShardState
from distnadam.transitions import LEGAL, Answer, Compute, Effect, Phase, Work

_HANDLERS = {kind: f"_on_{kind.__name__.lower()}" for kinds in LEGAL.values() for kind in kinds}


class Shard:
    """The state machine of one shard; the host calls `receive` and `computed` one at a time."""

    def __init__(self, spec: msg.ShardSpec, state: ShardState) -> None:
        self.spec, self.state = spec, state
        self.config, self.clock, self.members = spec.config, Clock(), Members(spec.index, spec.num_workers)
        self.epoch = self.round = self.skipped = 0
        self.phase = Phase.COLLECTING
        self.lr = 0.0
        self._now = Round()
        self._last: tuple[msg.Outcome, str | None] = ("applied", None)
        self.gate = Gate()
        self._pulls: list[tuple[Any, msg.Pull]] = []
        self._broken: BaseException | None = None

    # What the host may do in each phase

    def receive(self, message: Any, caller: Any) -> list[Effect]:
        """Take one message; return what is to be done. Raise a ProtocolError, with nothing changed, where it is refused."""
        if self._broken is not None and type(message) not in LEGAL[Phase.BROKEN]:
            raise ShardLost(f"shard {self.spec.index}: broken by {type(self._broken).__name__}: {self._broken}") from self._broken
        if type(message) not in LEGAL[self.phase]:
            raise IllegalMessage(f"shard {self.spec.index}: {type(message).__name__} is not legal while {self.phase.value}")
        handler = getattr(self, _HANDLERS[type(message)])
        return [*handler(message, caller), *self._progress()]

    def computed(self, work: Work, result: Any) -> list[Effect]:
        """Take the result of work asked for: `Measured`, or the pair (clock after the step, its learning rate)."""
        if work is Work.MEASURE:
            self._now.measured = result
            self.phase = Phase.AWAITING_NORMS
            answers = self._now.answer(result)
            if DIRECT in self._now.pushes and self.gate.holder is None:
                self._now, self.phase = Round(), Phase.COLLECTING  # who asked for the step is gone
            return [*answers, *self._settle(), *self._progress()]
        self.clock, self.lr = result
        self.state.swap()
        return [*self._decide("applied", None), *self._progress()]

    def broke(self, error: BaseException) -> list[Effect]:
        """Take that work failed half-way: whoever waits gets `error`, and the shard serves no one any more."""
        self.phase, self._broken = Phase.BROKEN, error
        callers = [*(waiting.caller for waiting in self._now.waiting), *(caller for caller, _ in self._pulls), *self.gate.drain()]
        self._now, self._pulls = Round(), []
        return [Answer(caller, error) for caller in callers]

    def gradients(self) -> list[Flat]:
        """Return the round's gradients in rank order."""
        return [g for _, push in sorted(self._now.pushes.items()) if (g := push.gradients) is not None]

    def square_sums(self) -> Any:
        """Return the whole model's sums of squares, where clipping by norm has them."""
        return self._now.square_sums

    def load(self, clock: Clock, decided: int, skipped: int, ledger: dict[str, Any]) -> None:
        """Take the place in time of a checkpoint whose arrays are in the state."""
        self.clock, self.round, self.skipped, self.members.ledger = clock, decided, skipped, Ledger.from_dict(ledger)
        self.gate.limit(decided)

    # Workers

    def _on_join(self, message: msg.Join, caller: Any) -> list[Effect]:
        return [Answer(caller, msg.Joined(self.members.join(message.rank, message.incarnation)))]

    def _on_push(self, push: msg.Push, caller: Any) -> list[Effect]:
        if self.members.already_counted(push, self.round):
            return [Answer(caller, self._decided(push.want_parameters))]
        self.members.check_current(push, self.epoch, self.round)
        waiting, held = Waiting(caller, push.rank, push.incarnation, push.want_parameters), self._now.pushes.get(push.rank)
        if self.phase is not Phase.COLLECTING:  # the round has all its pushes, but may need this worker to relay the norms
            if self._now.measured is not None:
                return [Answer(caller, self._now.measured)]
            self._now.waiting.append(waiting)
            return []
        superseded: list[Effect] = []
        if held is None or held.incarnation < push.incarnation:
            superseded = self._now.supersede(push, self.spec.index)
        self._now.waiting.append(waiting)
        return [*superseded, *self._drop_pushes_that_wait_for_the_dead()]

    def _on_norms(self, message: msg.Norms, caller: Any) -> list[Effect]:
        if self.members.already_counted(message, self.round):
            return [Answer(caller, self._decided(message.want_parameters))]
        self.members.check_current(message, self.epoch, self.round)
        return self._take_norms(message.square_sums, Waiting(caller, message.rank, message.incarnation, message.want_parameters))

    def _on_pull(self, pull: msg.Pull, caller: Any) -> list[Effect]:
        self.members.check_newest(pull.rank, pull.incarnation)
        self._pulls.append((caller, pull))
        return self._settle()

    def _on_leave(self, message: msg.Leave, caller: Any) -> list[Effect]:
        self.members.leave(message.rank, message.incarnation)
        return [Answer(caller, None)]

    def _on_lost(self, message: msg.Lost, caller: Any) -> list[Effect]:
        self.members.lose(message.rank, message.incarnation)
        return self._drop_pushes_that_wait_for_the_dead()

    # Whoever acts on the optimizer as a whole

    def _on_hold(self, message: msg.Hold, caller: Any) -> list[Effect]:
        self.gate.ask(caller, message.token)
        return self._settle()

    def _on_advance(self, message: msg.Advance, caller: Any) -> list[Effect]:
        self.gate.require(message.token, self.spec.index)
        self.gate.advance(caller, message.round)
        return self._settle()

    def _on_release(self, message: msg.Release, caller: Any) -> list[Effect]:
        held = self.gate.holder == message.token
        given_up = self.gate.release(message.token)
        if held and DIRECT in self._now.pushes and self.phase in (Phase.COLLECTING, Phase.AWAITING_NORMS):
            self._now, self.phase = Round(), Phase.COLLECTING  # a step that its caller did not see through
        refused: list[Effect] = [Answer(c, IllegalMessage(f"shard {self.spec.index}: the hold was given up")) for c in given_up]
        return [*refused, Answer(caller, None), *self._settle()]

    def _on_read(self, message: msg.Read, caller: Any) -> list[Effect]:
        self.gate.require(message.token, self.spec.index)
        arrays = self.state.arrays()
        return [Answer(caller, {name: arrays[name] for name in message.what})]

    def _on_write(self, message: msg.Write, caller: Any) -> list[Effect]:
        self.gate.require(message.token, self.spec.index)
        self.state.write(message.state)
        if message.clock is not None:
            self.clock = message.clock
        self.epoch += 1
        error = StaleEpoch(f"shard {self.spec.index}: the state was replaced after round {self.round}; pull and compute again")
        return [*self._drop_pushes(error), Answer(caller, None)]

    def _on_setrate(self, message: msg.SetRate, caller: Any) -> list[Effect]:
        self.gate.require(message.token, self.spec.index)
        self.config = self.config.with_lr(message.lr)
        return [Answer(caller, None)]

    def _on_step(self, message: msg.Step, caller: Any) -> list[Effect]:
        """Take the round for a step from outside; a push that came since the holder looked is late."""
        self.gate.require(message.token, self.spec.index)
        late = LatePush(f"shard {self.spec.index}: round {self.round + 1} was taken by apply_gradients; pull and push for the next")
        dropped = self._drop_pushes(late)
        self.gate.limit(self.round + 1)
        incarnation = self.members.ledger.admit(DIRECT, None)
        self._now.pushes[DIRECT] = msg.Push(self.epoch, DIRECT, incarnation, self.round + 1, message.gradients, message.complaint)
        self._now.waiting.append(Waiting(caller, DIRECT, incarnation))
        return dropped

    def _on_stepnorms(self, message: msg.StepNorms, caller: Any) -> list[Effect]:
        self.gate.require(message.token, self.spec.index)
        return self._take_norms(message.square_sums, Waiting(caller, DIRECT, self.members.ledger.newest(DIRECT)))

    def _on_describe(self, message: msg.Describe, caller: Any) -> list[Effect]:
        waiting_for = tuple(rank for rank in range(self.spec.num_workers) if rank not in self._now.pushes)
        description = msg.Description(
            spec=self.spec,
            epoch=self.epoch,
            round=self.round,
            iterations=self.clock.iterations,
            skipped=self.skipped,
            phase=self.phase.value,
            waiting_for=waiting_for,
            left=tuple(sorted(self.members.left)),
            dead=tuple(sorted(self.members.dead)),
            held=self.gate.holder is not None,
            lr=self.config.lr,
        )
        return [Answer(caller, description)]

    # The round

    def _progress(self) -> list[Effect]:
        """Take the round as far as it goes without the host."""
        now = self._now
        if not self.gate.passes(self.round):
            return []
        if self.phase is Phase.COLLECTING and (DIRECT in now.pushes or len(now.pushes) == self.spec.num_workers):
            complaints = [push.complaint for _, push in sorted(now.pushes.items()) if push.complaint is not None]
            if complaints:
                return self._refuse("; ".join(complaints))
            self.phase = Phase.MEASURING if self.config.clips_by_norm else Phase.STEPPING
            return [Compute(Work.MEASURE if self.config.clips_by_norm else Work.STEP)]
        if self.phase is Phase.AWAITING_NORMS and now.square_sums is not None:
            for tensor, total in zip(self.spec.layout.tensors, now.square_sums, strict=True):
                if not math.isfinite(total):
                    return self._refuse(f"the norm of the mean gradient of {tensor.path!r} overflows")
            self.phase = Phase.STEPPING
            return [Compute(Work.STEP)]
        return []

    def refused(self, error: DistNadamError) -> list[Effect]:
        """Take that a step could not be begun: nothing was touched, whoever waits gets the error, and the round begins anew."""
        return [*self._drop_pushes(error), *self._settle()]

    def _drop_pushes_that_wait_for_the_dead(self) -> list[Effect]:
        """A round that has every push it needs ends also where a worker died after pushing."""
        missing = sorted(self.members.dead - self._now.pushes.keys())
        if self.phase is not Phase.COLLECTING or not missing or DIRECT in self._now.pushes:
            return []
        who = f"shard {self.spec.index}: worker {missing[0]}"
        return self._drop_pushes(WorkerLost(f"{who} died before it pushed for round {self.round + 1}; the others' pushes were dropped"))

    def _drop_pushes(self, error: DistNadamError) -> list[Effect]:
        """Begin the round anew; whoever waited for it gets the error."""
        refused = self._now.refuse(error)
        self._now, self.phase = Round(), Phase.COLLECTING
        return refused

    def _refuse(self, complaint: str) -> list[Effect]:
        return self._decide("skipped" if self.spec.options.on_nonfinite == "skip" else "refused", complaint)

    def _decide(self, outcome: msg.Outcome, complaint: str | None) -> list[Effect]:
        """End the round: count its pushes, answer who waits, begin the next."""
        self.round += 1
        self.skipped += outcome != "applied"
        self._last = (outcome, complaint)
        for rank, push in self._now.pushes.items():
            self.members.ledger.count(rank, push.incarnation, self.round)
        ended, self._now, self.phase = self._now, Round(), Phase.COLLECTING
        return [*(Answer(w.caller, self._told(w, ended.pushes.get(w.rank))) for w in ended.waiting), *self._settle()]

    def _told(self, waiting: Waiting, counted: msg.Push | None) -> msg.Decided | LatePush:
        """Say how the round ended to one who waited for it, unless another worker's push was counted for its rank."""
        if counted is None or counted.incarnation != waiting.incarnation:
            other = "without this rank" if counted is None else f"with the push of worker {counted.incarnation}"
            return LatePush(
                f"shard {self.spec.index}: rank {waiting.rank}: round {self.round} was completed {other}; this push did not count"
            )
        return self._decided(waiting.want_parameters)

    def _settle(self) -> list[Effect]:
        """Answer the pulls, advances and holds whose time has come."""
        ready = [(caller, pull) for caller, pull in self._pulls if pull.at_least <= self.round]
        self._pulls = [x for x in self._pulls if x[1].at_least > self.round]
        effects: list[Effect] = [Answer(caller, self._decided(pull.want_parameters)) for caller, pull in ready]
        effects += [Answer(caller, None) for caller in self.gate.arrived(self.round)]
        if self.phase in (Phase.COLLECTING, Phase.AWAITING_NORMS):
            effects += [Answer(caller, self._held()) for caller in self.gate.admit(self.round)]
        return effects

    def _held(self) -> msg.Held:
        return msg.Held(self.epoch, self.round, self.clock, self.skipped, tuple(sorted(self._now.pushes)), self.members.ledger.to_dict())

    def _decided(self, want_parameters: bool) -> msg.Decided:
        outcome, complaint = self._last
        return msg.Decided(
            self.epoch,
            self.round,
            self.clock.iterations,
            outcome,
            complaint,
            self.lr,
            self.state.active,
            self.state.params if want_parameters else None,
        )

    # Checks

    def _take_norms(self, square_sums: Any, waiting: Waiting) -> list[Effect]:
        if self._now.measured is None:
            raise IllegalMessage(f"shard {self.spec.index}: norms came while {self.phase.value}")
        self._now.waiting.append(waiting)
        self._now.square_sums = square_sums
        return []
