"""Leases: a shard may answer only while its lease is valid, so a partitioned one falls silent.

A shard renews its lease again and again; it counts from when the shard asked. A supervisor gives
leases while Ray's head says that its node belongs to the cluster. If it can neither reach nor kill
a shard, it refuses the next renewal and waits until the last lease is over before it puts another
process in the shard's place. So of two sides of a partition the one with Ray's head goes on, and
the other stands still. No clock is compared with another host's; every clock runs on while a
process, or its machine, is stopped. No Ray here.
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
    """Return a lease's seconds: a part of the time after which a silent shard counts as dead."""
    return max(_LEAST_S, shard_timeout_s / _SHARE)


def now() -> float:
    """Return the seconds of a clock that runs on while this machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A shard's lease, which a thread of its own renews.

    Args:
        lasts_s: seconds for which it is valid, from when it was asked for.
        ask: asks for renewal, with all that the supervisor must know first; True renews it, None
            does not now, False says that it never will be again.
        renewed: called after each renewal.
        refused: called once it will never be renewed.
    """

    def __init__(
        self,
        lasts_s: float,
        ask: Callable[[tuple[Any, ...]], bool | None],
        renewed: Callable[[], None],
        refused: Callable[[], None],
    ) -> None:
        self._lasts_s = lasts_s
        self._ask = ask
        self._renewed = renewed
        self._refused = refused
        self._lock = threading.Lock()
        self._until = 0.0
        self._invalid_before = 0.0
        self._reports: tuple[Any, ...] = ()
        self._wake = threading.Event()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @property
    def valid(self) -> bool:
        """Whether the shard may answer anybody now."""
        return now() < self._until

    def invalidate(self, report: Any) -> None:
        """End the present lease; only one that the supervisor gives knowing `report` is valid."""
        with self._lock:
            self._reports = (*self._reports, report)
            self._until = 0.0
            self._invalid_before = now()
        self._wake.set()

    def _keep(self) -> None:
        while True:
            self._wake.clear()
            with self._lock:
                asked, reports = now(), self._reports
            answer = None
            with suppress(Exception):  # the supervisor is dead, or cannot be reached
                answer = self._ask(reports)
            if answer is False:
                self._refused()
                return
            if answer:
                self._extend(asked, len(reports))
                self._renewed()
            self._wake.wait(self._lasts_s / _SHARE if answer else _AGAIN_S)

    def _extend(self, asked: float, told: int) -> None:
        with self._lock:
            self._reports = self._reports[told:]
            if asked >= self._invalid_before and not self._reports:
                self._until = asked + self._lasts_s


class LeaseManager:
    """The leases that a supervisor gives; a thread of its own asks whether it may give any.

    Args:
        lasts_s: seconds for which a lease is valid.
        belongs: asks Ray's head whether this node belongs to the cluster; raises, or does not
            return, if the head cannot be asked.
        deposed: called when it does not.
    """

    def __init__(
        self, lasts_s: float, belongs: Callable[[], bool], deposed: Callable[[], None]
    ) -> None:
        self._lasts_s = lasts_s
        self._belongs = belongs
        self._deposed = deposed
        self._lock = threading.Lock()
        self._given: dict[str, float] = {}
        self._known: set[str] = set()
        self._trusted_s = lasts_s / 2
        self._belonged = 0.0
        self._began = now()
        threading.Thread(target=self._keep, name="leader", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        """Whether the supervisor may give leases, and decide anything, now."""
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
        """Give a shard leases from now on.

        Args:
            who: the shard.
            inherited: whether an earlier supervisor may have given it one until it was cut off.
        """
        with self._lock:
            self._known.add(who)
            if inherited:
                self._given[who] = self._began + self._trusted_s

    def refuse(self, who: str) -> float:
        """Give a shard no lease any more; return the seconds until its last one is over."""
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
