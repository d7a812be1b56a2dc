"""The bytes that this process has sent to and got from other hosts by TCP, for whoever looks.

A connection counts in an object of its own, in its own thread; what is read here may lag behind.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(eq=False, slots=True)
class Count:
    """The bytes of one connection."""

    sent: int = 0
    received: int = 0


class HostTraffic:
    """The bytes to and from each host, of connections that are open and that were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Count, str] = {}
        self._ended: dict[str, Count] = {}

    def begin(self, host: str, count: Count) -> None:
        """Take a connection's bytes into account from now on."""
        with self._lock:
            self._open[count] = host

    def end(self, count: Count) -> None:
        """Keep the sum of a connection that counts no more, if it was taken into account."""
        with self._lock:
            if (host := self._open.pop(count, None)) is not None:
                _add(self._ended, host, count)

    def by_host(self) -> Mapping[str, tuple[int, int]]:
        """Return the bytes sent to, and received from, each host."""
        with self._lock:
            total = {host: Count(each.sent, each.received) for host, each in self._ended.items()}
            for count, host in self._open.items():
                _add(total, host, count)
        return {host: (each.sent, each.received) for host, each in total.items()}


def _add(total: dict[str, Count], host: str, count: Count) -> None:
    so_far = total.setdefault(host, Count())
    so_far.sent += count.sent
    so_far.received += count.received


def host_traffic() -> HostTraffic:
    """Return this process's; a forked child, which has no connection, begins at nothing."""
    return _of(os.getpid())


@cache
def _of(pid: int) -> HostTraffic:
    return HostTraffic()
