"""How two sides that a network has cut apart never both go on: a shard tells nobody of a round
without leave, and leave lapses.

A shard asks its supervisor for leave again and again, and counts it from when it asked. A
supervisor gives leave while Ray's head says that its node is a part of the cluster; where it can
neither reach nor kill a shard, it gives that one none any more, and waits until the last has lapsed
before it puts another in its place. So the side with Ray's head goes on, and the other stands
still. No clock is compared with another host's; all of them run on while a process, or its machine,
is stopped. No Ray here.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_SHARE = 4
_LEAST_S = 0.2
_AGAIN_S = 0.05


def lease_s(shard_timeout_s: float) -> float:
    """Return how long leave lasts: a part of the time after which a silent shard counts as dead."""
    return max(_LEAST_S, shard_timeout_s / _SHARE)


def now() -> float:
    """Return the seconds of a clock that nothing stops."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A shard's leave, asked for by a thread of its own.

    Args:
        lasts_s: seconds from when it was asked for.
        ask: asks, with what the supervisor is to know before it answers; True gives leave, False
            says that it never will again.
        renewed: called whenever there is leave.
        refused: called when there will be none any more.
    """

    def __init__(
        self,
        lasts_s: float,
        ask: Callable[[Any], bool | None],
        renewed: Callable[[], None],
        refused: Callable[[], None],
    ) -> None:
        self._lasts_s, self._ask, self._renewed, self._refused = lasts_s, ask, renewed, refused
        self._lock = threading.Lock()
        self._until = self._needed_since = 0.0
        self._told: Any = None
        self._wake = threading.Event()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @property
    def valid(self) -> bool:
        """Whether somebody may be told of a round now."""
        return now() < self._until

    def invalidate(self, told: Any) -> None:
        """Do without the leave there is until the supervisor has given another, knowing this."""
        with self._lock:
            self._told, self._until, self._needed_since = told, 0.0, now()
        self._wake.set()

    def _keep(self) -> None:
        while True:
            self._wake.clear()
            with self._lock:
                asked, told = now(), self._told
            answer = None
            with suppress(Exception):  # it is dead, or not to be reached
                answer = self._ask(told)
            if answer is False:
                self._refused()
                return
            if answer:
                self._take(asked, told)
                self._renewed()
            self._wake.wait(self._lasts_s / _SHARE if answer else _AGAIN_S)

    def _take(self, asked: float, told: Any) -> None:
        with self._lock:
            if asked >= self._needed_since and told is self._told:
                self._until, self._told = asked + self._lasts_s, None


class LeaseManager:
    """The leave that a supervisor gives; whether it may give any is looked up by a thread of its
    own.

    Args:
        lasts_s: seconds for which it lasts.
        belongs: asks Ray's head whether this node is a part of the cluster; raises, or does not
            return, where it cannot be asked.
        deposed: called when it is not.
    """

    def __init__(
        self, lasts_s: float, belongs: Callable[[], bool], deposed: Callable[[], None]
    ) -> None:
        self._lasts_s, self._belongs, self._deposed = lasts_s, belongs, deposed
        self._lock = threading.Lock()
        self._given: dict[str, float] = {}
        self._known: set[str] = set()
        self._trusted_s = lasts_s / 2
        self._belonged = 0.0
        self._began = now()
        threading.Thread(target=self._keep, name="charge", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        """Whether leave may be given, and anything be decided, now."""
        return now() < self._belonged + self._trusted_s

    def renew(self, who: str) -> bool | None:
        """Renew a shard's lease; False if it is unknown or refused, None while nobody gets any."""
        with self._lock:
            if who not in self._known:
                return False
            if not self.is_leader:
                return None
            self._given[who] = now()
            return True

    def admit(self, who: str, *, inherited: bool = False) -> None:
        """Know a shard from now on; an inherited one may have been given leave by an earlier
        supervisor until that one was cut off.
        """
        with self._lock:
            self._known.add(who)
            if inherited:
                self._given[who] = self._began + self._trusted_s

    def refuse(self, who: str) -> float:
        """Give a shard no leave any more; return in how many seconds, 0 at least, the last has
        lapsed.
        """
        with self._lock:
            self._known.discard(who)
            return max(0.0, self._given.get(who, 0.0) + self._lasts_s - now())

    def _keep(self) -> None:
        while True:
            asked = now()
            with suppress(Exception):
                if self._belongs():
                    self._belonged = asked
                else:
                    self._deposed()
            time.sleep(self._lasts_s / (2 * _SHARE))
