"""How a primary replicates rounds to a standby of another host: the state, then each round's mean
gradient and its record, from the primary's memory to the standby's.

Both cut the arrays into the same pieces, and each message, one piece at most behind it, is
acknowledged once it has come whole. A round counts as delivered with its record's acknowledgement:
the mean before it is in the standby's memory then, and is applied whatever becomes of the primary.
One that came half is never applied.

The end of the connection is not the standby's death, but it ends the stream: until the supervisor
knows that this standby is out of date it could be promoted without the rounds since, and a new
connection would have to bring the whole state again, as it would to a new standby. So it is lost,
as one is whose calls fail, and there is one way to follow a primary: from the state on, without a
gap.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack_record, unpack_record
from distnadam.protocol.frames import HEADER
from distnadam.protocol.supervisor_messages import DetachStandby, Record, ReplicatedRound
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.transport.replication import ReplicationStream
from distnadam.transport.tcp_connection import (
    HANDSHAKE_S,
    Endpoint,
    Parts,
    Receiver,
    TcpConnection,
    check_bytes,
    parts_of,
    primary_greeting,
)
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.tcp_listener import TcpListener

PIECE_BYTES = 1 << 22
_CLOSE_S = 1.0
_HANG_UP_S = 10.0
_Message = tuple[bytes, Parts]


class TcpReplicationStream(ReplicationStream):
    """A standby of another host: it gets the state from the arrays themselves, then rounds.

    The arrays must not change until this has returned. Filling takes about as long as three rounds,
    whose means go the same way, so no copy is made to go on meanwhile.

    Args:
        shard: the shard's index.
        endpoint: where the standby listens.
        arrays: the primary's, by name, of which the standby gets a copy.
        decided: the round they are of.
        timeout_s: seconds without an acknowledgement after which a standby is given up.

    Raises:
        LaneError: nobody answers there who knows the secret, or the state was not acknowledged.
    """

    def __init__(
        self,
        shard: int,
        endpoint: Endpoint,
        arrays: Mapping[str, Flat],
        decided: int,
        timeout_s: float,
    ) -> None:
        sizes = {space: values.size for space, values in arrays["params"].items()}
        self.mean = self._mean = empty_flat(sizes)
        self.reached = decided
        self._timeout_s = timeout_s
        self._connection = _AcknowledgedConnection()
        try:
            self._connection.open(endpoint, primary_greeting(shard))
            self._connection.post([*_messages("state", _state_parts(arrays)), _WHOLE])
            if not self._connection.acknowledged(timeout_s):
                raise LaneError(self._connection.why or f"it was silent for {timeout_s:g} s")
        except (OSError, TimeoutError, LaneError) as error:
            self._connection.hang_up("the standby was not filled")
            raise LaneError(
                f"the standby of shard {shard} cannot be filled at {endpoint.host} port "
                f"{endpoint.port}: {error}"
            ) from error

    @override
    def ready(self) -> bool:
        """Return whether the connection is there; the last mean was acknowledged."""
        return self._connection.why is None

    @override
    def send(self, record: Record) -> bool:
        applied = isinstance(record, ReplicatedRound) and record.outcome == "applied"
        mean = _messages("mean", parts_of(self._mean)) if applied else ()
        self._connection.post([*mean, _record_message(record)])
        if not self._connection.acknowledged(self._timeout_s):
            return False
        if isinstance(record, ReplicatedRound):
            self.reached = record.round
        return True

    @override
    def close(self) -> None:
        if self._connection.why is None:
            self._connection.post([_record_message(DetachStandby())])
            self._connection.acknowledged(_CLOSE_S)
        self._connection.hang_up("the primary goes on without this standby")


class _AcknowledgedConnection(Receiver):
    """A primary's end of a connection on which each message is acknowledged, in order.

    Attributes:
        why: why the connection has ended; None while it has not.
    """

    def __init__(self) -> None:
        self._thread = dialling_thread()
        self._connection: TcpConnection | None = None
        self._changed = threading.Condition()
        self._posted = 0
        self._acknowledged = -1  # 0 once the peer has proven itself
        self.why: str | None = None

    def open(self, endpoint: Endpoint, greeting: Mapping[str, Any]) -> None:
        """Connect, and wait until both ends have proven themselves."""
        self._connection = TcpConnection(self, endpoint.secret, greeting)
        dial(self._connection, endpoint)
        if not self.acknowledged(HANDSHAKE_S):
            raise LaneError(self.why or "it does not prove itself")

    def post(self, messages: Iterable[_Message]) -> None:
        """Send messages, whose arrays must not change until they are acknowledged."""
        posted = list(messages)
        with self._changed:
            self._posted += len(posted)
            self._thread.call(self._send, posted)

    def _send(self, messages: list[_Message]) -> None:
        assert self._connection is not None
        for message, parts in messages:
            if self.why is None:
                self._connection.send(message, parts)

    def acknowledged(self, timeout_s: float) -> bool:
        """Wait until all is acknowledged; return False if the connection ended, or stood still so
        long.

        A full cable takes longer than that for a piece: bytes that go, or wait for their turn, are
        a sign of life. Those of a standby that halts soon go no more.
        """
        with self._changed:
            while self._acknowledged < self._posted and self.why is None:
                moved, sent = partial(self._has_moved, self._acknowledged), self._num_sent
                if not self._changed.wait_for(moved, timeout_s) and not self._goes_on(sent):
                    break
            return self._acknowledged == self._posted

    @property
    def _num_sent(self) -> int:
        return 0 if self._connection is None else self._connection.num_sent

    def _goes_on(self, sent: int) -> bool:
        connection = self._connection
        return connection is not None and (connection.num_sent > sent or connection.awaits_turn)

    def _has_moved(self, before: int) -> bool:
        return self._acknowledged > before or self.why is not None

    def hang_up(self, why: str) -> None:
        """End the connection; nothing is read from the arrays any more when this returns."""
        if self._connection is not None:
            with suppress(TimeoutError):
                self._thread.run(self._close(self._connection, why), _HANG_UP_S)

    async def _close(self, connection: TcpConnection, why: str) -> None:
        connection.close(why)

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        with self._changed:
            self._acknowledged = 0
            self._changed.notify_all()

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        check_bytes((), num_bytes)
        number = msgpack.unpackb(message)
        if number != self._acknowledged + 1 or number > self._posted:
            raise LaneError(f"message {number!r:.100} was acknowledged, and not sent or before")
        return number, ()

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        with self._changed:
            self._acknowledged = what
            self._changed.notify_all()

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        with self._changed:
            self.why = why
            self._changed.notify_all()


class TcpStandbyReceiver(Receiver):
    """A standby's end: takes the state, then records, in the thread of its connections.

    A new primary, or the same one that begins again, ends the earlier connection, and what the
    standby had by that.

    Args:
        shard: the shard's index.
        sizes: elements of the shard's ranges per space.
        arrays: the names of what the state is made of.
        begin: called with the arrays by name once they are there.
        apply: called with each record and the round's mean gradient.
        host: the address to listen at.
        ports: the first and the last port to try; None for any.

    Raises:
        LaneError: it cannot listen there.
    """

    def __init__(
        self,
        shard: int,
        sizes: dict[str, int],
        arrays: Sequence[str],
        begin: Callable[[dict[str, Flat]], None],
        apply: Callable[[Record, Flat], None],
        host: str,
        ports: tuple[int, int] | None,
    ) -> None:
        self._shard = shard
        self._sizes = sizes
        self._arrays = arrays
        self._begin = begin
        self._apply = apply
        self._primary: TcpConnection | None = None
        self._landing: _Landing
        self._closing = threading.Lock()
        self._is_closed = False
        self._listener = TcpListener(self, f"the standby of shard {shard}", host, ports)

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return self._listener.endpoint

    def close(self) -> None:
        """Take nothing any more; what had come whole is applied when this returns."""
        with self._closing:
            if not self._is_closed:
                self._listener.close()
            self._is_closed = True

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        if greeting.get("shard") != self._shard:
            raise LaneError(f"expected the primary of shard {self._shard}, got {greeting}")
        self._listener.admit(connection)
        if self._primary is not None:
            self._primary.close("the primary has connected anew")
        self._apply(DetachStandby(), {})
        self._primary = connection
        self._landing = _Landing(self._sizes, self._arrays)

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        if connection is not self._primary:
            raise LaneError("another primary has connected since")
        kind, content = _unpacked(message)
        parts = self._landing.parts(kind, content)
        check_bytes(parts, num_bytes)
        return (kind, content), parts

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        kind, content = what
        record = self._landing.take(kind, content)
        if kind == "whole":
            self._begin(self._landing.state)
        self._landing.acknowledged += 1
        connection.send(msgpack.packb(self._landing.acknowledged))
        if record is not None:
            try:
                self._apply(record, self._landing.mean)
            except Exception as error:
                raise LaneError(f"{record} could not be followed: {error}") from error

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        self._listener.forget(connection)
        if connection is self._primary:
            self._primary = None


@dataclass
class _Expected:
    """The pieces that come, and how many of them have."""

    pieces: list[memoryview]
    came: int = 0


class _Landing:
    """The memory that one connection's pieces go to, and how many of each have come."""

    def __init__(self, sizes: dict[str, int], arrays: Sequence[str]) -> None:
        self.state = {name: empty_flat(sizes) for name in arrays}
        self.mean = empty_flat(sizes)
        self.acknowledged = 0
        self._expected = {
            "state": _Expected(list(_pieces(_state_parts(self.state)))),
            "mean": _Expected(list(_pieces(parts_of(self.mean)))),
        }

    def parts(self, kind: str, content: Any) -> Parts:
        """Return the memory for what is behind a message; raise LaneError if it is not expected."""
        if kind in ("whole", "record"):
            return ()
        expected = self._expected.get(kind)
        if expected is None or content != expected.came or content >= len(expected.pieces):
            raise LaneError(f"{kind} {content!r:.100} is not the piece that comes next")
        return [expected.pieces[content]]

    def take(self, kind: str, content: Any) -> Record | None:
        """Note what has come, and return the record that it is; raise LaneError if not all came."""
        if kind == "record":
            record = unpack_record(content)
            applied = isinstance(record, ReplicatedRound) and record.outcome == "applied"
            mean = self._expected["mean"]
            if mean.came != (len(mean.pieces) if applied else 0):
                raise LaneError(f"{record} came behind {mean.came} pieces of a mean")
            mean.came = 0
            return record
        if kind == "whole":
            state = self._expected.pop("state", None)
            if state is None or state.came != len(state.pieces):
                raise LaneError("a state was said to be whole that is not")
        else:
            self._expected[kind].came += 1
        return None


def _state_parts(arrays: Mapping[str, Flat]) -> Parts:
    return [part for flat in arrays.values() for part in parts_of(flat)]


def _pieces(parts: Parts) -> Iterator[memoryview]:
    """Cut arrays as both ends do."""
    for part in parts:
        for begin in range(0, len(part), PIECE_BYTES):
            yield part[begin : begin + PIECE_BYTES]


def _messages(kind: str, parts: Parts) -> Iterator[_Message]:
    for number, piece in enumerate(_pieces(parts)):
        yield _packed(kind, number), [piece]


def _record_message(record: Record) -> _Message:
    return _packed("record", pack_record(record)[HEADER.size :]), ()


def _packed(kind: str, content: Any) -> bytes:
    packed: bytes = msgpack.packb((kind, content))
    return packed


def _unpacked(message: bytes) -> tuple[str, Any]:
    try:
        kind, content = msgpack.unpackb(message)
    except Exception as error:
        raise LaneError(f"{message!r:.100} is no message of a primary") from error
    if not isinstance(kind, str) or (kind == "record" and not isinstance(content, bytes)):
        raise LaneError(f"{message!r:.100} is no message of a primary")
    return kind, content


_WHOLE: _Message = (_packed("whole", None), ())
"""What comes after the state."""
