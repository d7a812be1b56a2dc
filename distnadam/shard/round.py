"""One round of one shard: its pushes, the norms if clipping needs them, and the callers that wait
for its end. Pure; it knows of no other round.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distnadam.errors import (
    DistNadamError,
    GroupChanged,
    IllegalMessage,
    LatePush,
    SupersededWorker,
)
from distnadam.nadam.mean import Grouping
from distnadam.protocol.messages import GroupPush, PartialNorms, Push, PushNote
from distnadam.protocol.round_settings import ORDINARY, RoundSettings, absent_in
from distnadam.shard.effects import Answer, Effect
from distnadam.shard.ledger import DIRECT
from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout


@dataclass(slots=True)  # not frozen, which costs a microsecond a step
class Waiter:
    """A caller that gets the round's result, and the worker for which it asked."""

    caller: Any
    rank: int
    incarnation: int
    want_parameters: bool = False
    group: GroupPush | None = None
    """The group's push for which it asked, `rank` being its first member; None for a single one."""


@dataclass(frozen=True)
class Member:
    """One rank's part of a group's push."""

    rank: int
    group: GroupPush

    @property
    def note(self) -> PushNote:
        """What identifies the rank's push."""
        return self.group.members[self.rank]

    @property
    def incarnation(self) -> int:
        """The worker's."""
        return self.note.incarnation

    @property
    def rejection(self) -> str | None:
        """Why the rank's gradients cannot be used, if so."""
        return self.note.rejection

    @property
    def settings(self) -> RoundSettings:
        """What else the rank says of the round."""
        return self.note.settings

    @property
    def gradients(self) -> Flat | None:
        """The whole group's sum."""
        return self.group.gradients


_ALONE = Grouping((1,), 1)
Pushed = Push | Member
"""What counts for a rank: its own push, or its part of its group's."""


@dataclass
class Round:
    """One round of one shard. It is open while it takes pushes, and closed from its first work on.

    Attributes:
        shard: the shard's index, for messages.
        pushes: the pushes that count, by rank.
        superseded: pushes whose worker was replaced, and those of its group if they came as one;
            they count again if `complete` says so.
        completed: ranks whose push counts whoever joins later, since another shard has counted it.
        waiting: who gets the result.
        is_closed: whether the round has all its pushes.
        is_ordinary: whether no push was entered that is rejected, or has settings; it may be
            superseded since.
        overrides: the learning rates and betas of its step alone, once all ranks have the same.
        absent: the tensors that no rank has a gradient of, once all pushes are in.
        partial_norms: this shard's sums of squares once measured, where clipping needs norms.
        square_sums: the whole model's, once a worker has sent them.
        refusal: why the round was begun again, if its step could not begin.
        in_place: whether nobody sees the parameters that its step reads, so that it may write the
            new ones over them.
    """

    shard: int
    pushes: dict[int, Pushed] = field(default_factory=dict)
    superseded: dict[int, Pushed] = field(default_factory=dict)
    completed: set[int] = field(default_factory=set)
    waiting: list[Waiter] = field(default_factory=list)
    is_closed: bool = False
    is_ordinary: bool = True
    overrides: bytes = b""
    absent: frozenset[int] = frozenset()
    partial_norms: PartialNorms | None = None
    square_sums: Array | None = None
    refusal: DistNadamError | None = None
    in_place: bool = False

    @property
    def is_direct(self) -> bool:
        """Whether it is a direct step (`apply_gradients`)."""
        return DIRECT in self.pushes

    def take_settings(self) -> None:
        """Take what the settings of the pushes, which are all there, say of the step."""
        given = [push.settings for push in self.pushes.values()]
        self.overrides, self.absent = given[0].overrides, absent_in(given)

    def summands(self, sum_group: int) -> tuple[list[Flat], Grouping]:
        """Return the gradients in rank order, and how they are averaged: rank // sum_group is a
        rank's group, and ranks that are absent belong to none.
        """
        if len(self.pushes) == 1:
            (alone,) = self.pushes.values()
            if isinstance(alone, Push) and alone.gradients is not None:
                return [alone.gradients], _ALONE
        ranks = sorted(self.pushes)
        gradients: list[Flat] = []
        if sum_group == 1:  # all one after the other
            gradients = [g for rank in ranks if (g := self.pushes[rank].gradients) is not None]
            return gradients, Grouping((len(gradients),) if gradients else (), len(ranks))
        sizes: Counter[int] = Counter()
        for rank in ranks:
            push = self.pushes[rank]
            if isinstance(push, Member) and rank != min(push.group.members):
                continue  # the first member's are the sum of all
            if push.gradients is not None:
                gradients.append(push.gradients)
                sizes[rank // sum_group] += 1
        return gradients, Grouping(tuple(sizes.values()), len(ranks))

    def overflow(self, layout: Layout) -> str | None:
        """Return a rejection that names the tensor whose norm is not finite; None if all are."""
        assert self.square_sums is not None
        for tensor, total in zip(layout.tensors, self.square_sums, strict=True):
            if not math.isfinite(total):
                return f"the norm of the mean gradient of {tensor.path!r} overflows"
        return None

    def is_orphaned(self, newest: Mapping[int, int]) -> bool:
        """Whether every worker that pushed was replaced, so that none may send the norms."""
        return not self.is_direct and all(
            push.incarnation < newest.get(rank, 0) for rank, push in self.pushes.items()
        )

    # Pushes

    def add(self, push: Push, waiter: Waiter) -> list[Effect]:
        """Add a push and its caller; a closed round takes only the caller, who may send norms."""
        if self.is_closed and self.partial_norms is not None:
            return [Answer(waiter.caller, self.partial_norms)]
        effects: list[Effect] = []
        held = self.pushes.get(push.rank)
        is_newer = held is None or (
            held.incarnation < push.incarnation and push.rank not in self.completed
        )
        if not self.is_closed and is_newer:
            effects = self.enter(push)
        self.waiting.append(waiter)
        return effects

    def add_group(self, group: GroupPush, waiter: Waiter) -> list[Effect]:
        """Add a group's push, which has all members that the round needs, and its caller.

        Raises:
            GroupChanged: a member counts already with another push, or with its own for certain.
        """
        if not self._holds(group):
            if self.is_closed or self.completed & group.members.keys():
                raise group_changed(self.shard)
            for rank, note in group.members.items():
                self.pushes[rank] = Member(rank, group)
                self.superseded.pop(rank, None)
                if note.rejection is not None or note.settings is not ORDINARY:
                    self.is_ordinary = False
        if self.is_closed and self.partial_norms is not None:
            return [Answer(waiter.caller, self.partial_norms)]
        self.waiting.append(waiter)
        return []

    def add_norms(self, square_sums: Array, waiter: Waiter) -> None:
        """Take the whole model's sums of squares; raise IllegalMessage if the round awaits none."""
        if self.partial_norms is None or waiter.rank not in self.pushes:
            raise IllegalMessage(f"shard {self.shard}: norms came, but its round awaits none")
        self.waiting.append(waiter)
        self.square_sums = square_sums

    def supersede(self, rank: int, incarnation: int) -> list[Effect]:
        """Take back the push of a worker older than this one, unless it must count.

        If it came as part of its group's, that is taken back whole.
        """
        held = self.pushes.get(rank)
        if held is None or rank in self.completed or self.is_closed:
            return []
        if held.incarnation >= incarnation:
            return []
        if isinstance(held, Member):
            return self._set_aside(held.group)
        self.superseded[rank] = self.pushes.pop(rank)
        return self._ask_again()

    def complete(self, push: Push, newest: Mapping[int, int]) -> list[Effect]:
        """Have the push of a replaced worker count after all: the one kept here, or else this.

        One that came as part of its group's counts with the whole group.

        Args:
            push: the push; without gradients if only its note is known.
            newest: the newest incarnation of each rank.

        Raises:
            IllegalMessage: there is none, and this one has no gradients.
        """
        rank = push.rank
        kept = self.superseded.get(rank)
        if kept is not None and kept.incarnation == push.incarnation:
            self._restore(kept, newest)
        held = self.pushes.get(rank)
        is_here = held is not None and held.incarnation == push.incarnation
        if not is_here and push.gradients is None and push.rejection is None:
            raise IllegalMessage(
                f"shard {self.shard}: rank {rank}: the gradients of worker {push.incarnation} for "
                f"round {push.round} are not available any more"
            )
        if is_here and isinstance(held, Member):
            self.completed.update(held.group.members)
        self.completed.add(rank)
        return [] if is_here else [*self.enter(push), *self._ask_again()]

    def committed(self, rank: int) -> PushNote | None:
        """Return the note of a rank's push that counts whoever joins; None if there is none."""
        is_certain = rank in self.pushes and (self.is_closed or rank in self.completed)
        return self.pushes[rank].note if is_certain else None

    def keep_members(self, needed: Collection[int], sum_group: int) -> list[Effect]:
        """Forget the pushes of ranks that are no longer members, and groups' pushes whose members
        are others now, unless the round is closed.
        """
        if self.is_closed:
            return []
        kept = {DIRECT, *needed}
        for push in list(self.pushes.values()):
            if isinstance(push, Member) and not is_whole(push.group, needed, sum_group):
                kept -= push.group.members.keys()
                self.superseded = {
                    rank: other
                    for rank, other in self.superseded.items()
                    if not isinstance(other, Member)
                }
        gone = [push for rank, push in self.pushes.items() if rank not in kept]
        self.pushes = {rank: push for rank, push in self.pushes.items() if rank in kept}
        return self._ask_again(gone)

    def _holds(self, group: GroupPush) -> bool:
        """Whether each push of a group's is here, as part of it or by itself."""
        return all(
            rank in self.pushes and self.pushes[rank].incarnation == note.incarnation
            for rank, note in group.members.items()
        )

    def _set_aside(self, group: GroupPush) -> list[Effect]:
        """Take a group's push back whole."""
        gone = [self.pushes.pop(rank) for rank in group.members]
        self.superseded.update((push.rank, push) for push in gone)
        return self._ask_again(gone)

    def _ask_again(self, gone: Sequence[Pushed] = ()) -> list[Effect]:
        """Have callers send their pushes singly whose group's is not here any more, or was taken
        back with their own.
        """
        groups = [push.group for push in gone if isinstance(push, Member)]
        again = [
            w
            for w in self.waiting
            if (w.group is not None and not self._holds(w.group))
            or any(group.holds(w.rank, w.incarnation) for group in groups)
        ]
        self.waiting = [w for w in self.waiting if w not in again]
        return [Answer(w.caller, group_changed(self.shard)) for w in again]

    def _restore(self, kept: Pushed, newest: Mapping[int, int]) -> None:
        """Have a push that was taken back count again, with its group's if it came as part of it.

        Not so if a push of another worker may count for another member.
        """
        if not isinstance(kept, Member):
            self.pushes[kept.rank] = self.superseded.pop(kept.rank)
            return
        members = kept.group.members
        for rank, note in members.items():
            held = self.pushes.get(rank)
            is_other = held is not None and held.incarnation != note.incarnation
            is_certain = rank in self.completed or newest.get(rank, 0) == note.incarnation
            if rank != kept.rank and (is_other or not is_certain):
                return
        for rank in members:
            self.pushes[rank] = Member(rank, kept.group)
            self.superseded.pop(rank, None)

    def enter(self, push: Push) -> list[Effect]:
        """Enter a push; refuse those who wait for the push of an older worker of its rank."""
        held = self.pushes.get(push.rank)
        again = self._set_aside(held.group) if isinstance(held, Member) else []
        self.pushes[push.rank] = push
        self.superseded.pop(push.rank, None)
        if push.rejection is not None or push.settings is not ORDINARY:
            self.is_ordinary = False
        old = [w for w in self.waiting if w.rank == push.rank and w.incarnation < push.incarnation]
        if not old:
            return again
        self.waiting = [w for w in self.waiting if w not in old]
        who = f"shard {self.shard}: rank {push.rank} was taken over by worker {push.incarnation}"
        return [
            *again,
            *(
                Answer(
                    w.caller,
                    SupersededWorker(f"{who}; the push of worker {w.incarnation} was not counted"),
                )
                for w in old
            ),
        ]

    # Answers

    def answer(self, reply: Any) -> list[Effect]:
        """Answer everyone who waits."""
        answers: list[Effect] = [Answer(waiter.caller, reply) for waiter in self.waiting]
        self.waiting = []
        return answers

    def measured(self, norms: PartialNorms) -> list[Effect]:
        """Keep this shard's sums of squares, and answer those who wait with them."""
        self.partial_norms = norms
        return self.answer(norms)

    def late_push(self, waiter: Waiter, number: int) -> LatePush:
        """Return the error for one whose push did not count in round `number`."""
        counted = self.pushes.get(waiter.rank)
        how = (
            "without this rank"
            if counted is None
            else f"with the push of worker {counted.incarnation}"
        )
        return LatePush(
            f"shard {self.shard}: rank {waiter.rank}: round {number} was completed {how}; this "
            "push did not count"
        )


def is_whole(group: GroupPush, needed: Collection[int], sum_group: int) -> bool:
    """Whether a push has all ranks of one group that its round needs, and no others."""
    numbers = {rank // sum_group for rank in group.members}
    return len(numbers) == 1 and group.members.keys() == {
        rank for rank in needed if rank // sum_group in numbers
    }


def group_changed(shard: int) -> GroupChanged:
    """Return the refusal of a group's push."""
    return GroupChanged(f"shard {shard}: the group's push does not count as one; push singly")
