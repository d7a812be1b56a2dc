"""The round that a shard collects: the pushes, and who waits to hear how it ends. Pure."""

from dataclasses import dataclass, field
from typing import Any

import distnadam.messages as msg
from distnadam.errors import DistNadamError, SupersededWorker
from distnadam.transitions import Answer, Effect


@dataclass(frozen=True)
class Waiting:
    """Who is to hear how the round ends, and for which worker it asked."""

    caller: Any
    rank: int
    incarnation: int
    want_parameters: bool = False


@dataclass
class Round:
    """Pushes by rank, those who wait, and where clipping needs norms the shard's sums and then the whole model's."""

    pushes: dict[int, msg.Push] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    measured: msg.Measured | None = None
    square_sums: Any = None

    def answer(self, reply: Any) -> list[Effect]:
        """Answer everyone who waits; nobody does any more."""
        waiting, self.waiting = self.waiting, []
        return [Answer(w.caller, reply) for w in waiting]

    def refuse(self, error: DistNadamError) -> list[Effect]:
        """Give everyone who waits the error, and forget the pushes."""
        self.pushes = {}
        return self.answer(error)

    def supersede(self, push: msg.Push, shard: int) -> list[Effect]:
        """Enter a push; refuse those who wait for the push of an older worker of its rank, which it replaces."""
        self.pushes[push.rank] = push
        old = [w for w in self.waiting if w.rank == push.rank and w.incarnation < push.incarnation]
        self.waiting = [w for w in self.waiting if w not in old]
        who = f"shard {shard}: rank {push.rank} was taken over by worker {push.incarnation}"
        return [Answer(w.caller, SupersededWorker(f"{who}; the push of worker {w.incarnation} was not counted")) for w in old]
