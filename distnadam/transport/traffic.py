"""The bytes that this process has sent to and got from other hosts by TCP, for whoever looks.

A connection counts in an object of its own, in its own thread; what is read here may lag behind.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

_RATE = struct.Struct("<Q")
_RATE_AT = 160
"""Where Linux has `tcpi_delivery_rate` in its `struct tcp_info`."""
_TELLS_BYTES = 1 << 20
"""What a connection must have sent before its rate says something of the cable."""


@dataclass(eq=False, slots=True)
class Count:
    """The bytes of one connection.

    `delivery_rate` returns the bytes per second at which the system delivered last, while what it
    was given was enough to tell; 0 if that is not known.
    """

    sent: int = 0
    received: int = 0
    delivery_rate: Callable[[], float] = float


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

    def delivery_rates(self) -> Mapping[str, float]:
        """Return the bytes per second at which the system delivered last to each host, as far as
        enough was sent there to tell.
        """
        with self._lock:
            opened = list(self._open.items())
        rates: dict[str, float] = {}
        for count, host in opened:
            if count.sent >= _TELLS_BYTES and (rate := count.delivery_rate()):
                rates[host] = max(rates.get(host, 0.0), rate)
        return rates


def _add(total: dict[str, Count], host: str, count: Count) -> None:
    so_far = total.setdefault(host, Count())
    so_far.sent += count.sent
    so_far.received += count.received


def delivery_rate(sock: socket.socket) -> float:
    """Return the bytes per second at which the system delivered last what a socket sent; 0 if it
    does not say.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RATE_AT + _RATE.size)
        return float(_RATE.unpack_from(info, _RATE_AT)[0])
    except (OSError, AttributeError, struct.error):  # closed, no Linux, an old one
        return 0.0


def host_traffic() -> HostTraffic:
    """Return this process's; a forked child, which has no connection, begins at nothing."""
    return _of(os.getpid())


@cache
def _of(pid: int) -> HostTraffic:
    return HostTraffic()
