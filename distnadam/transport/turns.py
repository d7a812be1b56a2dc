"""Who sends when: of the connections of one process, one at a time sends large arrays."""

from collections.abc import Callable
from typing import Protocol

_MOST_PLACES = 1 << 32


class Sender(Protocol):
    """A connection that sends large arrays in its turn.

    Attributes:
        place: whose turn is first: that of the lowest place.
    """

    place: int

    def take_turn(self) -> None:
        """Send: the turn has come."""


class Turns:
    """Lets one connection of a loop at a time send a slice of its large arrays, in turn.

    Where every host sends to the next one first, then to the one after it, no port has two senders,
    and each connection sees the speed of the whole cable, by which the system then paces it. Turns
    of whole arrays instead of slices would not recover once one host is late: it delays those whose
    answers it awaits, and the hosts stay out of step.

    Args:
        call_soon: calls a function in the loop's thread, after what runs there now.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._waiting: list[Sender] = []
        self._holder: Sender | None = None

    def take(self, connection: Sender) -> bool:
        """Return whether it is the connection's turn; if not, `take_turn` is called when it is."""
        if connection is self._holder:
            return True
        if connection not in self._waiting:
            self._waiting.append(connection)
            if self._holder is None and len(self._waiting) == 1:  # others may come at once
                self._call_soon(self._begin)
        return False

    def leave(self, connection: Sender) -> None:
        """Pass the turn on, or wait for it no more."""
        if connection in self._waiting:
            self._waiting.remove(connection)
        if connection is self._holder:
            self._holder = None
            self._next()

    def give(self, connection: Sender) -> bool:
        """Give the turn to the next that waits, and wait for the next one; False if none waits."""
        if not self._waiting:
            return False
        self._waiting.append(connection)
        self._holder = None
        self._call_soon(self._next)
        return True

    def _begin(self) -> None:
        self._waiting.sort(key=lambda connection: connection.place)
        self._next()

    def _next(self) -> None:
        if self._holder is None and self._waiting:
            self._holder = self._waiting.pop(0)
            self._holder.take_turn()


def place_after(own: int, other: int) -> int:
    """Return a place by which the next number after one's own comes first, and lower ones last."""
    return (other - own - 1) % _MOST_PLACES
