"""The round that a shard collects: the pushes, and who waits to hear how it ends. Pure."""

from dataclasses import dataclass, field
from typing import Any

import distnadam.protocol.messages as msg
from distnadam.errors import DistNadamError, SupersededWorker
from distnadam.shard.phases import Answer, Effect
from distnadam.tensors.arrays import name_of


@dataclass(frozen=True)
class Waiter:
    """Who is to hear how the round ends, and for which worker it asked."""

    caller: Any
    rank: int
    incarnation: int
    want_parameters: bool = False


@dataclass
class Round:
    """Pushes by rank, those set aside when their worker was taken over, who waits, and where
    clipping needs norms the sums and totals.

    `adopted` are ranks whose push here counts whoever pushes later, since another shard counts it.
    """

    pushes: dict[int, msg.Push] = field(default_factory=dict)
    aside: dict[int, msg.Push] = field(default_factory=dict)
    adopted: set[int] = field(default_factory=set)
    waiting: list[Waiter] = field(default_factory=list)
    measured: msg.PartialNorms | None = None
    square_sums: Any = None

    def answer(self, reply: Any) -> list[Effect]:
        """Answer everyone who waits; nobody does any more."""
        waiting, self.waiting = self.waiting, []
        return [Answer(w.caller, reply) for w in waiting]

    def refuse(self, error: DistNadamError) -> list[Effect]:
        """Give everyone who waits the error, and forget the pushes."""
        self.pushes, self.aside, self.adopted = {}, {}, set()
        return self.answer(error)

    def set_aside(self, rank: int, incarnation: int) -> None:
        """Put the push of a worker older than this one aside, unless it must count."""
        if (
            rank in self.pushes
            and rank not in self.adopted
            and self.pushes[rank].incarnation < incarnation
        ):
            self.aside[rank] = self.pushes.pop(rank)

    def restore(self, rank: int, incarnation: int) -> bool:
        """Let a push that was set aside count after all; return whether it is there."""
        if rank in self.aside and self.aside[rank].incarnation == incarnation:
            self.pushes[rank] = self.aside.pop(rank)
        return rank in self.pushes and self.pushes[rank].incarnation == incarnation

    def supersede(self, push: msg.Push, shard: int) -> list[Effect]:
        """Enter a push; refuse those who wait for the push of an older worker of its rank, which it
        replaces.
        """
        self.pushes[push.rank] = push
        self.aside.pop(push.rank, None)
        old = [w for w in self.waiting if w.rank == push.rank and w.incarnation < push.incarnation]
        self.waiting = [w for w in self.waiting if w not in old]
        who = f"shard {shard}: rank {push.rank} was taken over by worker {push.incarnation}"
        return [
            Answer(
                w.caller,
                SupersededWorker(f"{who}; the push of worker {w.incarnation} was not counted"),
            )
            for w in old
        ]


def note_of(push: msg.Push) -> msg.PushNote:
    """Return what others need to know of a push."""
    dtypes = (
        None
        if push.gradients is None
        else {space: name_of(array.dtype) for space, array in push.gradients.items()}
    )
    return msg.PushNote(
        incarnation=push.incarnation, round=push.round, dtypes=dtypes, rejection=push.rejection
    )
