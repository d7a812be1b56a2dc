"""The speed and the delay of the way to another host, over a connection as the shards have them."""

import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.transport.tcp_connection import Endpoint, Parts, Receiver, TcpConnection, greeting
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.tcp_listener import TcpListener

_PROOF_S = 10.0
_ROUND_TRIPS = 20
_FIRST_BYTES = 1 << 20
_MOST_BYTES = 1 << 25
_LONG_S = 0.1
"""Seconds that what is sent must take, for its speed to be believed."""
_CONGESTION_FILE = "/proc/sys/net/ipv4/tcp_congestion_control"


@dataclass(frozen=True, kw_only=True)
class Link:
    """What was measured between this process and another host's.

    Attributes:
        round_trip_s: the median time in which an empty message was answered.
        sent_bytes_per_s: the speed towards the other host.
        received_bytes_per_s: the speed from there.
    """

    round_trip_s: float
    sent_bytes_per_s: float
    received_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """How gradients and parameters would go from one node to another, or within one.

    Attributes:
        sender: the node of a worker, in words.
        receiver: the node of a shard.
        carrier: "shared memory", "TCP" or "Ray objects".
        why: why that one.
    """

    sender: str
    receiver: str
    carrier: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured between this process and a node.

    Attributes:
        host: the node, in words.
        link: its speed and delay; None where it cannot be reached by TCP, or did not answer.
        why_not: why it did not answer, if so.
        congestion: the congestion control of new connections, here and there.
        way: how the node would be reached from here, if that is known.
    """

    host: str
    link: Link | None
    why_not: str | None
    congestion: tuple[str, str]
    way: Way | None


@dataclass(frozen=True, kw_only=True)
class Links:
    """The ways between all nodes, what was measured, a sentence for each thing wrong, and the
    bytes of memory that each node can still give.
    """

    ways: tuple[Way, ...]
    measured: tuple[Measured, ...]
    problems: tuple[str, ...]
    memory: Mapping[str, int]


class LinkServer(Receiver):
    """Takes what a `measure` of another host sends, and sends what it asks for.

    Args:
        host: the address to listen at.
        ports: the first and the last port to try; None for any.

    Raises:
        LaneError: it cannot listen there.
    """

    def __init__(self, host: str, ports: tuple[int, int] | None) -> None:
        self._room = _room()
        self._listener = TcpListener(self, "a measurement", host, ports)
        self.endpoint = self._listener.endpoint

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        self._listener.admit(connection)

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        wanted = msgpack.unpackb(message)
        if not isinstance(wanted, int) or not 0 <= wanted <= _MOST_BYTES:
            raise LaneError(f"{wanted!r:.100} bytes were asked for")
        return wanted, _part(self._room, num_bytes)

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        connection.send(msgpack.packb(0), _part(self._room, what))

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        self._listener.forget(connection)

    def close(self) -> None:
        """Stop listening and close the connections."""
        self._listener.close()


class _Connection(Receiver):
    """The end that measures."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._room = _room()
        self._changed = threading.Condition()
        self._is_proven = False
        self._answers = 0
        self._why: str | None = None
        self._where = f"{endpoint.host} port {endpoint.port}"
        self._connection = TcpConnection(self, endpoint.secret, greeting(0))
        try:
            dial(self._connection, endpoint)
            self._wait(lambda: self._is_proven, time.monotonic() + _PROOF_S)
        except (OSError, TimeoutError, LaneError) as error:
            self.close()
            said = str(error) or "nobody answers"
            raise LaneError(f"{self._where} cannot be reached: {said}") from error

    def ask(self, sent: int, wanted: int, deadline: float) -> float:
        """Send so many bytes, get as many as wanted back; return the seconds that it took."""
        before = self._answers
        parts = _part(self._room, sent)
        began = time.perf_counter()
        dialling_thread().call(self._connection.send, msgpack.packb(wanted), parts)
        self._wait(lambda: self._answers > before, deadline)
        return time.perf_counter() - began

    def _wait(self, happened: Any, deadline: float) -> None:
        with self._changed:
            while not happened():
                if self._why is not None:
                    raise LaneError(self._why)
                if (left := deadline - time.monotonic()) <= 0:
                    raise LaneError("nothing came in time")
                self._changed.wait(left)

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        with self._changed:
            self._is_proven = True
            self._changed.notify_all()

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        return None, _part(self._room, num_bytes)

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        with self._changed:
            self._answers += 1
            self._changed.notify_all()

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        with self._changed:
            self._why = why
            self._changed.notify_all()

    def close(self) -> None:
        dialling_thread().call(self._connection.close, "it is needed no more")


def _room() -> memoryview:
    """Return the memory of all that one end sends and gets; what is in it does not matter."""
    return memoryview(bytearray(_MOST_BYTES))


def _part(room: memoryview, num_bytes: int) -> Parts:
    """Return so many bytes of the memory.

    Raises:
        LaneError: it has less.
    """
    if num_bytes > _MOST_BYTES:
        raise LaneError(f"{num_bytes} bytes are more than a measurement has")
    return [room[:num_bytes]] if num_bytes else []


def reach(endpoint: Endpoint) -> None:
    """Connect to an endpoint, and hang up once both ends have proven themselves.

    Raises:
        LaneError: it cannot be reached.
    """
    _Connection(endpoint).close()


def measure(endpoint: Endpoint, timeout_s: float) -> Link:
    """Measure the way to a `LinkServer`: some small messages, then up to 63 MB in each direction.

    The slower it is, the less is sent: ever twice as much, until that takes a tenth of a second.

    Raises:
        LaneError: it cannot be reached, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    connection = _Connection(endpoint)
    try:
        trips = [connection.ask(0, 0, deadline) for _ in range(_ROUND_TRIPS)]
        round_trip_s = statistics.median(trips)
        speeds = []
        for sends in (True, False):
            size, took_s = _FIRST_BYTES // 2, 0.0
            while took_s < _LONG_S and size < _MOST_BYTES:
                size *= 2
                sent, wanted = (size, 0) if sends else (0, size)
                took_s = max(connection.ask(sent, wanted, deadline) - round_trip_s, 1e-9)
            speeds.append(size / took_s)
    except LaneError as error:
        raise LaneError(f"{endpoint.host} port {endpoint.port}: {error}") from error
    finally:
        connection.close()
    return Link(
        round_trip_s=round_trip_s, sent_bytes_per_s=speeds[0], received_bytes_per_s=speeds[1]
    )


def carriers(transport: str, ports: tuple[int, int] | None) -> str:
    """Return how gradients and parameters move with these of `Options`, in words."""
    if transport == "objects":
        return "Ray objects, as Options(transport='objects') says"
    at = "any port" if ports is None else f"ports {ports[0]} to {ports[1]}"
    return (
        f"shared memory within a node, TCP at {at} between nodes, Ray objects where neither works"
    )


def congestion_control() -> str:
    """Return this host's congestion control, such as "cubic", as new connections have it."""
    try:
        with open(_CONGESTION_FILE, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
