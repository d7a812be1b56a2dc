"""The rounds of a shard: how the messages of workers fill one, how it ends, and who gets the
result. Pure.

It knows what waits and what was decided; the machine knows the shard's phase.
"""

from typing import Any, Literal

import distnadam.protocol.messages as msg
from distnadam.errors import (
    DistNadamError,
    IllegalMessage,
    LatePush,
    Reconfigured,
    RoundMismatch,
)
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.shard.effects import Answer, Effect, Replicate
from distnadam.shard.ledger import DIRECT
from distnadam.shard.membership import Numbered
from distnadam.shard.progress import Progress
from distnadam.shard.round import Round, Waiter, group_changed, is_whole
from distnadam.shard.verdict import Verdict, verdict_of
from distnadam.tensors.arrays import Array


class Rounds:
    """The round in progress, those decided, and the callers that wait for either.

    Attributes:
        progress: the rounds decided so far.
        current: the round in progress.
        pulls: who waits for a round to be decided, and what each asked.
    """

    def __init__(self, spec: ShardSpec, progress: Progress) -> None:
        self.progress = progress
        self._sum_group = spec.config.sum_group
        self._num_tensors = len(spec.layout.tensors)
        self._num_trained = len(spec.layout.tensors) - len(spec.layout.frozen)
        self._may_lack = spec.layout.optional - spec.layout.frozen
        self.current = Round(spec.index)
        self._shard = spec.index
        self.pulls: list[tuple[Any, msg.Pull]] = []

    # Messages

    def is_counted(self, rank: int, message: Numbered) -> bool:
        """Whether this very push was counted in a round decided since."""
        return self.progress.members.already_counted(rank, message, self.progress.round)

    def join(self, message: msg.Join, *, needs_norms: bool) -> tuple[msg.Joined, list[Effect]]:
        """Give a rank to a worker; the push of an older one counts no more, unless it must.

        `needs_norms` is whether the round in progress waits for norms.
        """
        rank = message.rank
        progress = self.progress
        committed = self.current.committed(rank) or progress.counted.get(rank)
        incarnation = progress.members.join(message)
        effects = self.current.supersede(rank, incarnation)
        joined = msg.Joined(
            incarnation=incarnation,
            round=progress.round,
            committed=committed,
            member=rank in progress.next_members(),
            orphaned=needs_norms
            and self.current.is_orphaned(progress.members.ledger.newest_of_all()),
        )
        return joined, effects

    def push(self, push: msg.Push, caller: Any) -> list[Effect]:
        """Add a push to the round in progress; answer at once one that is counted already."""
        progress = self.progress
        if push.settings is not ORDINARY:
            self._check_absent(push.settings)
        if push.round <= progress.round and self.is_counted(push.rank, push):
            return [Answer(caller, progress.result(want_parameters=push.want_parameters))]
        progress.members.check_current(push, progress.epochs, progress.round)
        waiter = Waiter(caller, push.rank, push.incarnation, push.want_parameters)
        return self.current.add(push, waiter)

    def push_group(self, group: msg.GroupPush, caller: Any) -> list[Effect]:
        """Add a group's push to the round in progress; answer at once one that is counted already.

        Raises:
            GroupChanged: the pushes must come singly.
        """
        progress, who = self.progress, f"shard {self._shard}"
        members = group.members.items()
        for note in group.members.values():
            self._check_absent(note.settings)
        if members and all(self.is_counted(rank, note) for rank, note in members):
            return [Answer(caller, progress.result(want_parameters=group.want_parameters))]
        if (refusal := progress.epochs.refusal(group.epoch, who, progress.round)) is not None:
            raise refusal
        newest = progress.members.ledger.newest
        is_current = group.round == progress.round + 1 and all(
            note.round == group.round and note.incarnation == newest[rank] for rank, note in members
        )
        if not is_current or not is_whole(group, progress.next_members(), self._sum_group):
            raise group_changed(self._shard)
        first = min(group.members)
        incarnation = group.members[first].incarnation
        waiter = Waiter(caller, first, incarnation, group.want_parameters, group)
        return self.current.add_group(group, waiter)

    def total_norms(self, message: msg.TotalNorms, caller: Any) -> list[Effect]:
        """Give the round in progress the whole model's sums of squares."""
        progress = self.progress
        if self.is_counted(message.rank, message):
            return [Answer(caller, progress.result(want_parameters=message.want_parameters))]
        progress.members.check_current(message, progress.epochs, progress.round)
        current = self.current
        if message.rank not in current.pushes and current.refusal is not None:
            raise current.refusal  # the round that was measured was begun again
        waiter = Waiter(caller, message.rank, message.incarnation, message.want_parameters)
        current.add_norms(self._checked(message.square_sums), waiter)
        return []

    def complete_push(self, message: msg.CompletePush, caller: Any) -> list[Effect]:
        """Have the push of a replaced worker count, since another shard has counted it."""
        rank, note, progress = message.rank, message.note, self.progress
        self._check_absent(note.settings)
        is_certain = self.current.is_closed and rank in self.current.pushes
        if is_certain or self.is_counted(rank, note):
            return [Answer(caller, None)]
        if note.round != progress.round + 1:
            raise RoundMismatch(
                f"shard {self._shard}: rank {rank}: round {note.round} is to be completed, "
                f"expected round {progress.round + 1}"
            )
        push = msg.Push(
            epoch=progress.epochs.now,
            rank=rank,
            incarnation=note.incarnation,
            round=note.round,
            gradients=message.gradients,
            rejection=note.rejection,
            settings=note.settings,
        )
        newest = progress.members.ledger.newest_of_all()
        return [*self.current.complete(push, newest), Answer(caller, None)]

    def pull(self, pull: msg.Pull, caller: Any) -> None:
        """Have a caller wait for a round to be decided, which it may be already."""
        progress = self.progress
        progress.members.check_newest(pull.rank, pull.incarnation)
        if pull.at_least:
            refusal = progress.epochs.refusal(pull.epoch, f"shard {self._shard}", progress.round)
            if refusal is not None and not isinstance(refusal, Reconfigured):
                raise refusal  # that round may never come
        self.pulls.append((caller, pull))

    def require_untouched(self, epoch: int) -> None:
        """Raise IllegalMessage if a rank has pushed, or the epoch is not the present one."""
        pushed, now = sorted(self.current.pushes), self.progress.epochs.now
        if pushed or epoch != now:
            raise IllegalMessage(
                f"shard {self._shard}: a step of epoch {epoch} came in epoch {now}, when ranks "
                f"{pushed} had pushed"
            )

    def direct_step(self, message: msg.Step, caller: Any) -> list[Effect]:
        """Take the next round for a direct step; the pushes that wait for it are late."""
        progress, who = self.progress, f"shard {self._shard}"
        if message.settings is not ORDINARY:
            self._check_absent(message.settings)
        if message.round != progress.round + 1:
            raise RoundMismatch(
                f"{who}: expected a step for round {progress.round + 1}, got one for round "
                f"{message.round}"
            )
        dropped = self.drop(
            LatePush(
                f"{who}: round {message.round} was taken by apply_gradients; pull and push for the "
                "next"
            )
        )
        push = self.enter_direct(message)
        self.current.waiting.append(Waiter(caller, DIRECT, push.incarnation))
        return dropped

    def enter_direct(self, message: msg.Step) -> msg.Push:
        """Enter a direct step in the round in progress, which is empty; return its push."""
        progress = self.progress
        push = msg.Push(
            epoch=progress.epochs.now,
            rank=DIRECT,
            incarnation=progress.members.ledger.admit(DIRECT, message.incarnation),
            round=message.round,
            gradients=message.gradients,
            rejection=message.rejection,
            settings=message.settings,
        )
        self.current.in_place = self.is_in_place(message)
        self.current.enter(push)
        return push

    def is_in_place(self, message: msg.Step) -> bool:
        """Whether a direct step writes the new parameters over those that it reads."""
        state = self.progress.state
        return message.in_place and not state.masters and state.copies is None

    def direct_norms(self, message: msg.StepNorms, caller: Any) -> None:
        """Give the direct step the whole model's sums of squares."""
        pushed = self.current.pushes.get(DIRECT)
        waiter = Waiter(caller, DIRECT, 0 if pushed is None else pushed.incarnation)
        self.current.add_norms(self._checked(message.square_sums), waiter)

    def _check_absent(self, settings: RoundSettings) -> None:
        """Raise IllegalMessage if a push lacks the gradient of a tensor that needs one."""
        if not settings.absent <= self._may_lack:
            raise IllegalMessage(
                f"shard {self._shard}: a push without the gradients of tensors "
                f"{sorted(settings.absent - self._may_lack)[:8]}, which need one"
            )

    def _checked(self, square_sums: Array) -> Array:
        """Return sums of squares; raise IllegalMessage unless there is one for each tensor."""
        if square_sums.shape != (self._num_tensors,):
            raise IllegalMessage(
                f"shard {self._shard}: norms of shape {square_sums.shape}, expected one for each "
                f"of {self._num_tensors} tensors"
            )
        return square_sums

    # The end of a round

    def verdict(self, on_nonfinite: Literal["raise", "skip"]) -> Verdict | None:
        """Return how the round in progress ends without a step; None if it is to be stepped."""
        return verdict_of(self.current.pushes, on_nonfinite, self._num_trained)

    def decide(self, outcome: msg.Outcome, rejection: str | None) -> list[Effect]:
        """End the round: count its pushes, replicate it, answer its callers, begin the next."""
        ended, progress = self.current, self.progress
        counted = self.count(outcome, rejection)
        effects: list[Effect] = [Replicate(progress.record(counted))]
        results: dict[bool, msg.RoundResult] = {}  # by whether it brings parameters
        for waiter in ended.waiting:
            held = ended.pushes.get(waiter.rank)
            if held is None or held.incarnation != waiter.incarnation:
                effects.append(Answer(waiter.caller, ended.late_push(waiter, progress.round)))
                continue
            wanted = waiter.want_parameters
            if wanted not in results:
                results[wanted] = progress.result(want_parameters=wanted)
            effects.append(Answer(waiter.caller, results[wanted]))
        return effects

    def count(
        self, outcome: msg.Outcome, rejection: str | None, rounds: int = 1
    ) -> dict[int, msg.PushNote]:
        """End the round: count its pushes, and begin the next; return what was counted.

        It stands for as many `rounds` as `Progress.decide` says.
        """
        ended = self.current
        self.current = Round(self._shard)
        return self.progress.decide(outcome, rejection, ended.pushes, ended.square_sums, rounds)

    def keep_members(self) -> list[Effect]:
        """Forget the pushes that the next members cannot be completed with."""
        return self.current.keep_members(self.progress.next_members(), self._sum_group)

    def begin_again(self) -> None:
        """Forget the pushes of the round in progress, and its callers."""
        self.current = Round(self._shard, refusal=self.current.refusal)

    def drop(self, error: DistNadamError) -> list[Effect]:
        """Begin the round again; its callers get the error."""
        refused = self.current.answer(error)
        self.begin_again()
        return refused

    def abandoned(self) -> DistNadamError | None:
        """Return the error for callers of a round that lacks a rank given up; None if none does."""
        if self.current.is_direct or self.current.completed:
            return None
        members = self.progress.members
        return members.abandoned(self.progress.round + 1, self.current.pushes)

    def ready_pulls(self) -> list[Effect]:
        """Answer the pulls whose round is decided."""
        decided = self.progress.round
        ready = [entry for entry in self.pulls if entry[1].at_least <= decided]
        self.pulls = [entry for entry in self.pulls if entry[1].at_least > decided]
        result = self.progress.result
        return [
            Answer(caller, result(want_parameters=pull.want_parameters)) for caller, pull in ready
        ]

    def remove_callers(self) -> list[Any]:
        """Forget the round in progress and the pulls, and return all their callers."""
        callers = [waiter.caller for waiter in self.current.waiting]
        callers += [caller for caller, _ in self.pulls]
        self.begin_again()
        self.pulls = []
        return callers
