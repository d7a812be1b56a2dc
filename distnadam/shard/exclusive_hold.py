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
    """

    def __init__(self) -> None:
        self.holder: str | None = None
        self.limit: float = math.inf
        self._queue: list[tuple[Any, str]] = []
        self._advances: list[tuple[Any, int]] = []

    @property
    def is_asked(self) -> bool:
        """Whether callers wait to hold the shard, or for a round that they let pass."""
        return bool(self._queue or self._advances)

    def require(self, token: str, shard: int) -> None:
        """Raise IllegalMessage unless the holder of this token holds the shard."""
        if self.holder != token:
            raise IllegalMessage(
                f"shard {shard}: this is legal only between Pause and Resume of the same caller"
            )

    def ask(self, caller: Any, token: str) -> None:
        """Queue for the hold."""
        self._queue.append((caller, token))

    def admit(self, decided: int) -> list[Any]:
        """Give the hold to the first in the queue if it is free, with `decided` as the last round.

        Returns:
            its caller; or those callers of the holder that asked again.
        """
        if self.holder is not None:
            again = [caller for caller, token in self._queue if token == self.holder]
            self._queue = [entry for entry in self._queue if entry[1] != self.holder]
            return again
        if not self._queue:
            return []
        caller, self.holder = self._queue.pop(0)
        self.limit = decided
        return [caller]

    def advance(self, caller: Any, until: int) -> None:
        """Let rounds pass up to and including `until`; `arrived` returns the caller then."""
        self.limit = until
        self._advances.append((caller, until))

    def arrived(self, decided: int) -> list[Any]:
        """Return the callers of `advance` whose round is decided."""
        arrived = [caller for caller, until in self._advances if until <= decided]
        self._advances = [x for x in self._advances if x[1] > decided]
        return arrived

    def release(self, token: str) -> list[Any]:
        """End this token's hold, and its waiting; return its callers that waited in the queue."""
        given_up = [caller for caller, waiting in self._queue if waiting == token]
        self._queue = [x for x in self._queue if x[1] != token]
        if self.holder == token:
            self.holder, self.limit = None, math.inf
        return given_up

    def reset(self) -> list[Any]:
        """End any hold; forget all callers that wait here, and return them."""
        self.holder, self.limit = None, math.inf
        return self.drain()

    def drain(self) -> list[Any]:
        """Forget all callers that wait here, and return them."""
        callers = [caller for caller, _ in (*self._queue, *self._advances)]
        self._queue = []
        self._advances = []
        return callers
