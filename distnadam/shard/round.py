"""One round of one shard: its pushes, the norms if clipping needs them, and the callers that wait
for its end. Pure; it knows of no other round.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from distnadam.errors import DistNadamError, IllegalMessage, LatePush, SupersededWorker
from distnadam.nadam.mean import Grouping
from distnadam.protocol.messages import PartialNorms, Push, PushNote
from distnadam.shard.effects import Answer, Effect
from distnadam.shard.ledger import DIRECT
from distnadam.tensors.arrays import NAME_OF, Array, Flat
from distnadam.tensors.layout import Layout


@dataclass(frozen=True)
class Waiter:
    """A caller that gets the round's result, and the worker for which it asked."""

    caller: Any
    rank: int
    incarnation: int
    want_parameters: bool = False


@dataclass
class Round:
    """One round of one shard. It is open while it takes pushes, and closed from its first work on.

    Attributes:
        shard: the shard's index, for messages.
        pushes: the pushes that count, by rank.
        superseded: pushes whose worker was replaced; they count again if `complete` says so.
        completed: ranks whose push counts whoever joins later, since another shard has counted it.
        waiting: who gets the result.
        is_closed: whether the round has all its pushes.
        is_rejected: whether a push was entered that rejects the round; it may be superseded since.
        partial_norms: this shard's sums of squares once measured, where clipping needs norms.
        square_sums: the whole model's, once a worker has sent them.
        refusal: why the round was begun again, if its step could not begin.
    """

    shard: int
    pushes: dict[int, Push] = field(default_factory=dict)
    superseded: dict[int, Push] = field(default_factory=dict)
    completed: set[int] = field(default_factory=set)
    waiting: list[Waiter] = field(default_factory=list)
    is_closed: bool = False
    is_rejected: bool = False
    partial_norms: PartialNorms | None = None
    square_sums: Array | None = None
    refusal: DistNadamError | None = None

    @property
    def is_direct(self) -> bool:
        """Whether it is a step from outside (`apply_gradients`)."""
        return DIRECT in self.pushes

    def summands(self, sum_group: int) -> tuple[list[Flat], Grouping]:
        """Return the gradients in rank order, and how they are averaged: rank // sum_group is a
        rank's group, and ranks that are absent belong to none.
        """
        ranks = sorted(self.pushes)
        gradients = [g for rank in ranks if (g := self.pushes[rank].gradients) is not None]
        if sum_group == 1:  # one after the other, as in one group
            return gradients, Grouping((len(ranks),), len(ranks))
        sizes = Counter(rank // sum_group for rank in ranks)
        return gradients, Grouping(tuple(sizes.values()), len(ranks))

    @property
    def rejection(self) -> str | None:
        """Why no step may be applied, as the pushes say in rank order; None if one may."""
        pushes = (self.pushes[rank] for rank in sorted(self.pushes))
        rejections = [push.rejection for push in pushes if push.rejection is not None]
        return "; ".join(rejections) if rejections else None

    def overflow(self, layout: Layout) -> str | None:
        """Return a rejection that names the tensor whose norm is not finite; None if all are."""
        assert self.square_sums is not None
        for tensor, total in zip(layout.tensors, self.square_sums, strict=True):
            if not math.isfinite(total):
                return f"the norm of the mean gradient of {tensor.path!r} overflows"
        return None

    def is_orphaned(self, newest: Mapping[int, int]) -> bool:
        """Whether every worker that pushed was replaced, so that none may send the norms."""
        return all(push.incarnation < newest.get(rank, 0) for rank, push in self.pushes.items())

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
            effects = self._enter(push)
        self.waiting.append(waiter)
        return effects

    def add_norms(self, square_sums: Array, waiter: Waiter) -> None:
        """Take the whole model's sums of squares; raise IllegalMessage if the round awaits none."""
        if self.partial_norms is None or waiter.rank not in self.pushes:
            raise IllegalMessage(f"shard {self.shard}: norms came, but its round awaits none")
        self.waiting.append(waiter)
        self.square_sums = square_sums

    def supersede(self, rank: int, incarnation: int) -> None:
        """Take back the push of a worker older than this one, unless it must count."""
        held = self.pushes.get(rank)
        if held is None or rank in self.completed or self.is_closed:
            return
        if held.incarnation < incarnation:
            self.superseded[rank] = self.pushes.pop(rank)

    def complete(self, push: Push) -> list[Effect]:
        """Have the push of a replaced worker count after all: the one kept here, or else this.

        Raises:
            IllegalMessage: there is none, and this one has no gradients.
        """
        rank = push.rank
        kept = self.superseded.get(rank)
        if kept is not None and kept.incarnation == push.incarnation:
            self.pushes[rank] = self.superseded.pop(rank)
        held = self.pushes.get(rank)
        is_here = held is not None and held.incarnation == push.incarnation
        if not is_here and push.gradients is None and push.rejection is None:
            raise IllegalMessage(
                f"shard {self.shard}: rank {rank}: the gradients of worker {push.incarnation} for "
                f"round {push.round} are not available any more"
            )
        self.completed.add(rank)
        return [] if is_here else self._enter(push)

    def committed(self, rank: int) -> PushNote | None:
        """Return the note of a rank's push that counts whoever joins; None if there is none."""
        is_certain = rank in self.pushes and (self.is_closed or rank in self.completed)
        return note_of(self.pushes[rank]) if is_certain else None

    def keep_members(self, needed: Collection[int]) -> None:
        """Forget the pushes of ranks that are no longer members, unless the round is closed."""
        if not self.is_closed:
            kept = {DIRECT, *needed}
            self.pushes = {rank: push for rank, push in self.pushes.items() if rank in kept}

    def _enter(self, push: Push) -> list[Effect]:
        """Enter a push; refuse those who wait for the push of an older worker of its rank."""
        self.pushes[push.rank] = push
        self.superseded.pop(push.rank, None)
        self.is_rejected = self.is_rejected or push.rejection is not None
        old = [w for w in self.waiting if w.rank == push.rank and w.incarnation < push.incarnation]
        self.waiting = [w for w in self.waiting if w not in old]
        who = f"shard {self.shard}: rank {push.rank} was taken over by worker {push.incarnation}"
        return [
            Answer(
                w.caller,
                SupersededWorker(f"{who}; the push of worker {w.incarnation} was not counted"),
            )
            for w in old
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


def note_of(push: Push) -> PushNote:
    """Return what other shards need to know of a push."""
    dtypes = (
        None
        if push.gradients is None
        else {space: NAME_OF[array.dtype] for space, array in push.gradients.items()}
    )
    return PushNote(
        incarnation=push.incarnation, round=push.round, dtypes=dtypes, rejection=push.rejection
    )
