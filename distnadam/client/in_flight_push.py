"""One push from its gradients to its round's end, as one record with named states. No I/O."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from distnadam.backends.base import Pending
from distnadam.errors import DistNadamError, NonFiniteGradient
from distnadam.protocol.messages import RoundResult
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges


class PushState(Enum):
    """How far a push has come.

    PREPARED -> SENT -> (MEASURED ->) DECIDED or FAILED. A push goes back to PREPARED whenever the
    shards changed under it, or its answers may have been lost: it is sent again, and counts once.
    """

    PREPARED = "to be sent, again or for the first time"
    SENT = "sent to every shard"
    MEASURED = "the norms of its round are known, and sent to every shard"
    DECIDED = "its round is over, and it counted"
    FAILED = "it does not count, or its round was refused"


ENDED = (PushState.DECIDED, PushState.FAILED)
"""The states that a push does not leave."""


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
    """

    epoch: int
    round: int
    parts: Callable[[list[Ranges]], Sequence[Flat]]
    rejection: str | None
    want_parameters: bool
    state: PushState = PushState.PREPARED
    pending: Pending | None = None
    square_sums: Any = None
    _result: RoundResult | None = None
    _error: DistNadamError | None = None

    def sent(self, pending: Pending) -> None:
        """Record that every shard was sent its part, and the answers that are now awaited."""
        self.state = PushState.SENT
        self.pending = pending

    def measured(self, pending: Pending) -> None:
        """Record that the norms were sent, and the answers that are now awaited."""
        self.state = PushState.MEASURED
        self.pending = pending

    def send_again(self) -> None:
        """Record that its answers are lost; what is known of its round's norms is kept."""
        self.state = PushState.PREPARED
        self.pending = None

    def decide(self, result: RoundResult) -> RoundResult:
        """Record how its round ended, and return it; raise NonFiniteGradient if refused."""
        self.pending = None
        if result.outcome == "refused":
            self.fail(refusal_of(result))
            return self.result()
        self.state = PushState.DECIDED
        self._result = result
        return result

    def fail(self, error: DistNadamError) -> None:
        """Record why it does not count."""
        self.state = PushState.FAILED
        self.pending = None
        self._error = error

    def result(self) -> RoundResult:
        """Return how its round ended, or raise why the push failed."""
        if self._error is not None:
            raise self._error
        assert self._result is not None, "the push is in flight"
        return self._result


def refusal_of(result: RoundResult) -> NonFiniteGradient:
    """Return the error for a round that was refused."""
    return NonFiniteGradient(
        f"round {result.round} was refused, no shard has moved: {result.rejection}"
    )
