"""One push from its gradients to its round's end, as one record with named states. No I/O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from distnadam.backends.base import Pending
from distnadam.errors import DistNadamError, NonFiniteGradient, RanksDisagree
from distnadam.protocol.messages import Outcome, RoundResult
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges


class PushState(Enum):
    """How far a push has come.

    PREPARED -> SENT -> (MEASURED ->) DECIDED or FAILED. A push goes back to PREPARED whenever the
    shards changed under it, or its answers may have been lost: it is sent again, and counts once.
    """

    PREPARED = "to be sent, again or for the first time"
    SENT = "sent to every shard"
    MEASURED = "sent to every shard, and the norms of its round are known"
    DECIDED = "its round is over, and it counted"
    FAILED = "it does not count, or its round was refused"


@dataclass
class InFlightPush:
    """One rank's gradients for one round.

    Args:
        epoch: of the parameters that they were computed from, or a later one without a rewind.
        round: the round they are for.
        parts: gives the gradients of each shard's ranges, however many shards there are by then;
            they stay as they are until the round is decided.
        rejection: why they cannot be used, or None.
        want_parameters: whether the answers are to bring the new parameters.
        settings: what else the rank says of the round.
        slices: by shard, how many `PushSlice`s of it were sent before it; none once it was sent.

    Attributes:
        pending: the answers that are awaited; None before it is sent, and once they are lost.
        square_sums: the norms of its round, once all shards have measured; kept if it is sent
            again.
        ended: how its round ended, or why it does not count; None while it is in flight.
    """

    epoch: int
    round: int
    parts: Callable[[list[Ranges]], Sequence[Flat]]
    rejection: str | None
    want_parameters: bool
    settings: RoundSettings = ORDINARY
    slices: Mapping[int, int] = field(default_factory=dict)
    pending: Pending | None = None
    square_sums: Any = None
    ended: RoundResult | DistNadamError | None = None

    @property
    def state(self) -> PushState:
        """How far it has come."""
        if self.ended is not None:
            return PushState.DECIDED if isinstance(self.ended, RoundResult) else PushState.FAILED
        if self.pending is None:
            return PushState.PREPARED
        return PushState.SENT if self.square_sums is None else PushState.MEASURED


REFUSED: frozenset[Outcome] = frozenset({"refused", "disagreed"})
"""The ends of a round that its pushes get as an error."""


def refusal_of(result: RoundResult) -> NonFiniteGradient | RanksDisagree:
    """Return the error for a round that was refused."""
    kind = RanksDisagree if result.outcome == "disagreed" else NonFiniteGradient
    return kind(f"round {result.round} was refused, no shard has moved: {result.rejection}")
