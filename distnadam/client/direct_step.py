"""A step from an already averaged gradient, which no worker pushes: one step however often sent."""

from dataclasses import dataclass
from typing import Any

from distnadam.errors import PushesPending
from distnadam.protocol.messages import Paused, Step
from distnadam.shard.ledger import DIRECT, Ledger
from distnadam.tensors.arrays import Flat


@dataclass
class DirectStep:
    """The incarnation and round of one direct step, and its norms once they are known.

    `round` is 0 before the first boundary.
    """

    incarnation: int = 0
    round: int = 0
    square_sums: Any = None

    def is_counted(self, paused: Paused) -> bool:
        """Whether a shard that stands there counts it; the others can get it only from here."""
        return Ledger.from_dict(paused.ledger).counted(DIRECT, self.incarnation, self.round)

    def choose_round(self, paused: Paused) -> None:
        """Take the next round at the first boundary; keep it later, unless workers had it since.

        Raises:
            PushesPending: workers have pushed for that round.
        """
        if self.round and (self.round > paused.round or self.is_counted(paused)):
            return
        if paused.pending:
            ranks = ", ".join(map(str, paused.pending))
            raise PushesPending(
                f"ranks {ranks} have pushed for round {paused.round + 1}: their round must end "
                "first"
            )
        self.incarnation = dict(paused.ledger["newest"]).get(DIRECT, 0) + 1
        self.round = paused.round + 1
        self.square_sums = None  # those of the round that it missed

    def message(
        self, token: str, gradients: Flat, rejection: str | None, *, in_place: bool
    ) -> Step:
        """Return the message for one shard, which `token` holds; `in_place` as `Step` says."""
        return Step(
            token=token,
            incarnation=self.incarnation,
            round=self.round,
            gradients=None if rejection else gradients,
            rejection=rejection,
            in_place=in_place,
        )
