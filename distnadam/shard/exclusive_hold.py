"""Which caller holds a shard, and how far its rounds may go meanwhile. One at a time, in the order
in which they asked. Pure.
"""

import math
from typing import Any

from distnadam.errors import IllegalMessage


class ExclusiveHold:
    """Lets rounds pass freely, or up to a limit while somebody holds the shard.

    Attributes:
        holder: the token of the caller that holds the shard; None if nobody does.
        limit: the last round that may be decided.
        queue: the callers that wait for the hold, each with its token.
        advances: the holder's calls that wait for a round to pass, each with that round.
    """

    def __init__(self) -> None:
        self.holder: str | None = None
        self.limit: float = math.inf
        self.queue: list[tuple[Any, str]] = []
        self.advances: list[tuple[Any, int]] = []

    def require(self, token: str, shard: int) -> None:
        """Raise IllegalMessage unless the holder of this token holds the shard."""
        if self.holder != token:
            raise IllegalMessage(
                f"shard {shard}: this is legal only between Pause and Resume of the same caller"
            )

    def require_nobody(self, shard: int) -> None:
        """Raise IllegalMessage if somebody holds the shard, or waits to."""
        if self.holder is not None or self.queue:
            raise IllegalMessage(f"shard {shard}: somebody holds it, or waits to")

    def let_pass(self, number: int) -> None:
        """Let one round pass, whoever holds the shard."""
        self.limit = max(self.limit, number)

    def ask(self, caller: Any, token: str) -> None:
        """Queue for the hold."""
        self.queue.append((caller, token))

    def admit(self, decided: int) -> list[Any]:
        """Give the hold to the first in the queue if it is free, with `decided` as the last round.

        Returns:
            its caller; or those callers of the holder that asked again.
        """
        if self.holder is not None:
            again = [caller for caller, token in self.queue if token == self.holder]
            self.queue = [entry for entry in self.queue if entry[1] != self.holder]
            return again
        if not self.queue:
            return []
        caller, self.holder = self.queue.pop(0)
        self.limit = decided
        return [caller]

    def advance(self, caller: Any, until: int) -> None:
        """Let rounds pass up to and including `until`; `arrived` returns the caller then."""
        self.limit = until
        self.advances.append((caller, until))

    def arrived(self, decided: int) -> list[Any]:
        """Return the callers of `advance` whose round is decided."""
        arrived = [caller for caller, until in self.advances if until <= decided]
        self.advances = [x for x in self.advances if x[1] > decided]
        return arrived

    def release(self, token: str) -> list[Any]:
        """End this token's hold, and its waiting; return its callers that waited in the queue."""
        given_up = [caller for caller, waiting in self.queue if waiting == token]
        self.queue = [x for x in self.queue if x[1] != token]
        if self.holder == token:
            self._let_go()
        return given_up

    def reset(self) -> list[Any]:
        """End any hold; forget all callers that wait here, and return them."""
        self._let_go()
        return self.drain()

    def drain(self) -> list[Any]:
        """Forget all callers that wait here, and return them."""
        callers = [caller for caller, _ in (*self.queue, *self.advances)]
        self.queue = []
        self.advances = []
        return callers

    def _let_go(self) -> None:
        self.holder = None
        self.limit = math.inf
