"""TCP between hosts: frames, each a message and the arrays behind it, received where they belong.

Both ends prove that they know a secret before anything else is accepted, and nothing is allocated
for a peer that has not. Nothing here knows what a message means. The end of a connection says that
the peer cannot be reached, not that it is dead.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import socket
import struct
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgpack
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.frames import VERSION, check_version
from distnadam.tensors.arrays import Flat
from distnadam.transport.traffic import Count, delivery_rate, host_traffic
from distnadam.transport.turns import Turns

log = logging.getLogger("distnadam")

HANDSHAKE_S = 10.0
_NONCE_BYTES = 32
_HEAD = struct.Struct("<IQ")
"""The bytes of the message, and those of the arrays behind it."""
_MOST_UNPROVEN = 1 << 10
_MOST_BYTES = 1 << 28
_STAGING_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 17
_UNSENT_BYTES = 1 << 16
_BULK_BYTES = 1 << 16
"""Of an array that is sent in turn; smaller ones are sent at once."""
_SLICE_BYTES = 1 << 18
"""After which the next connection has its turn."""
_STALLED_S = 0.02
"""Seconds without progress after which a connection passes its turn on."""
_DEAD_LINE_S = 10
"""Seconds after which a connection that acknowledges nothing is closed."""

Parts = Sequence[memoryview]
_Parser = Generator["int | memoryview", Any, None]


@dataclass(frozen=True)
class Endpoint:
    """Where a process listens for others of other hosts, and the secret of its connections."""

    host: str
    port: int
    secret: bytes


class Receiver(Protocol):
    """What an end does with what comes; called in the loop's thread."""

    def proven(self, connection: "TcpConnection", greeting: Mapping[str, Any]) -> None:
        """Take over a peer that has proven itself; a LaneError hangs up."""

    def landing(
        self, connection: "TcpConnection", message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        """Return what `arrived` gets, and the memory for the `num_bytes` behind the message.

        Raises:
            LaneError: it is no message, or other bytes belong behind it.
        """

    def arrived(self, connection: "TcpConnection", what: Any) -> None:
        """Take a message whose arrays have come whole."""

    def ended(self, connection: "TcpConnection", why: str) -> None:
        """Learn that the peer cannot be reached by this connection any more."""


class TcpConnection(asyncio.BufferedProtocol):
    """One end of a connection, used in its loop's thread.

    Args:
        receiver: takes what comes.
        secret: what both ends must know.
        greeting: what the end that connects says of itself; None for the end that listens.

    Attributes:
        turns: the connections among which one at a time sends large arrays; None if it is alone.
        place: whose turn is first: that of the lowest place.
        is_proven: whether both ends have shown that they know the secret.
    """

    def __init__(
        self, receiver: Receiver, secret: bytes, greeting: Mapping[str, Any] | None = None
    ) -> None:
        self.turns: Turns | None = None
        self.place = 0
        self._receiver = receiver
        self._secret = secret
        self._stalled: asyncio.TimerHandle | None = None
        self._greeting = greeting
        self._transport: Any = None
        self._staging = memoryview(bytearray(_MOST_UNPROVEN + _HEAD.size))
        self._begin = self._end = 0
        self._parser = self._parse()
        self._want: int | memoryview = 0
        self._outgoing: deque[memoryview] = deque()
        self._is_paused = False
        self._in_turn = 0
        self._why = ""
        self.is_proven = False
        self._count = Count()

    @property
    def num_sent(self) -> int:
        """The bytes that the system has taken so far."""
        return self._count.sent

    @property
    def awaits_turn(self) -> bool:
        """Whether it sends nothing because others of this process do."""
        return bool(self._outgoing) and not self._is_paused

    def send(self, message: bytes, parts: Parts = ()) -> None:
        """Send a message and the arrays behind it, which must not change until they are sent."""
        head = _HEAD.pack(len(message), sum(part.nbytes for part in parts))
        self._outgoing.append(memoryview(head + message))
        self._outgoing.extend(part for part in parts if part.nbytes)
        self._pump()

    def close(self, why: str) -> None:
        """Hang up; the receiver learns why."""
        self._why = self._why or why
        self._outgoing.clear()
        if self._transport is not None:
            self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._why:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=1, low=0)  # high=0 stops TLS for ever
        set_up(transport.get_extra_info("socket"))
        self._want = next(self._parser)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._outgoing.clear()
        self._want = 0  # no more of the memory that the rest would have come into
        self._leave_turn()
        self._parser.close()
        host_traffic().end(self._count)
        self._receiver.ended(self, self._why or str(exc or "the peer hung up"))

    @override
    def pause_writing(self) -> None:
        self._is_paused = True
        self._watch_turn()

    @override
    def resume_writing(self) -> None:
        self._is_paused = False
        if self._stalled is not None:
            self._stalled.cancel()
        self._pump()

    def take_turn(self) -> None:
        """Send large arrays, or pass the turn on if the socket takes nothing for a while."""
        self._in_turn = 0
        if self._is_paused:
            self._watch_turn()
        self._pump()

    def _watch_turn(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        loop = asyncio.get_running_loop()
        self._stalled = loop.call_later(_STALLED_S, self._leave_turn)

    def _leave_turn(self) -> None:
        if self.turns is not None:
            self.turns.leave(self)

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        if self._begin == self._end and isinstance(self._want, memoryview):
            return self._want
        return self._staging[self._end :]

    @override
    def buffer_updated(self, nbytes: int) -> None:
        self._count.received += nbytes
        try:
            if self._begin == self._end and isinstance(self._want, memoryview):
                self._want = self._want[nbytes:]
                if not self._want:
                    self._want = self._parser.send(None)
            else:
                self._end += nbytes
            self._take_staged()
        except (LaneError, ValueError) as error:
            self.close(str(error))
        except Exception as error:  # of one connection; the others are served on
            log.exception("a connection failed")
            self.close(f"{type(error).__name__}: {error}")

    def _take_staged(self) -> None:
        """Give the parser what it wants, as far as it has come."""
        while not self._why:
            there = self._end - self._begin
            if isinstance(self._want, int):
                if there < self._want:
                    break
                taken = bytes(self._staging[self._begin : self._begin + self._want])
                self._begin += self._want
                self._want = self._parser.send(taken)
                continue
            count = min(there, len(self._want))
            self._want[:count] = self._staging[self._begin : self._begin + count]
            self._begin += count
            self._want = self._want[count:]
            if self._want:
                break
            self._want = self._parser.send(None)
        rest = bytes(self._staging[self._begin : self._end])
        self._staging[: len(rest)] = rest
        self._begin, self._end = 0, len(rest)

    def _parse(self) -> _Parser:
        """Yield how many bytes to get, or the memory that they go to, for all that comes."""
        yield from self._prove()
        staged = self._staging[self._begin : self._end]
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._staging[: len(staged)] = staged
        self._begin, self._end = 0, len(staged)
        while True:
            num_bytes, behind = _HEAD.unpack((yield _HEAD.size))
            if num_bytes > _MOST_BYTES:
                raise LaneError(f"a message of {num_bytes} bytes was announced")
            message = yield from _grow(num_bytes)
            what, parts = self._receiver.landing(self, message, behind)
            yield from parts
            self._receiver.arrived(self, what)

    def _prove(self) -> _Parser:
        """Exchange nonces and proofs: HMAC-SHA256 over both nonces, the role and the greeting."""
        ours = secrets.token_bytes(_NONCE_BYTES)
        if self._greeting is None:
            self._say({"version": VERSION, "nonce": ours})
            said = yield from self._hear()
            greeting, theirs = _field(said, "greeting", bytes), _field(said, "nonce", bytes)
            self._check(said, "worker", ours + theirs + greeting)
            self._say({"proof": self._proof("shard", theirs + ours + greeting)})
            content = msgpack.unpackb(greeting)
        else:
            content = self._greeting
            greeting = msgpack.packb(dict(content))
            said = yield from self._hear()
            check_version(said.get("version"))
            theirs = _field(said, "nonce", bytes)
            proof = self._proof("worker", theirs + ours + greeting)
            self._say({"nonce": ours, "greeting": greeting, "proof": proof})
            self._check((yield from self._hear()), "shard", ours + theirs + greeting)
        check_version(content.get("version") if isinstance(content, dict) else None)
        self.is_proven = True
        peer = self._transport.get_extra_info("peername")
        if (sock := self._transport.get_extra_info("socket")) is not None:
            self._count.delivery_rate = partial(delivery_rate, sock)
        host_traffic().begin(peer[0] if peer else "a host that is gone", self._count)
        self._receiver.proven(self, content)

    def _say(self, content: Mapping[str, Any]) -> None:
        self.send(msgpack.packb(content))

    def _hear(self) -> Generator[int, bytes, dict[str, Any]]:
        num_bytes, behind = _HEAD.unpack((yield _HEAD.size))
        if num_bytes > _MOST_UNPROVEN or behind:
            raise LaneError("what came is no handshake")
        try:
            content = msgpack.unpackb((yield num_bytes))
        except Exception as error:
            raise LaneError("what came is no handshake") from error
        if not isinstance(content, dict):
            raise LaneError("what came is no handshake")
        return content

    def _proof(self, role: str, text: bytes) -> bytes:
        return hmac.digest(self._secret, role.encode() + b"\0" + text, hashlib.sha256)

    def _check(self, said: Mapping[str, Any], role: str, text: bytes) -> None:
        if not hmac.compare_digest(_field(said, "proof", bytes), self._proof(role, text)):
            raise LaneError("the peer does not know the secret")

    def _pump(self) -> None:
        """Send until the socket takes no more, or what is next must wait for its turn."""
        while self._outgoing and not self._is_paused:
            first = self._outgoing[0]
            if first.nbytes >= _BULK_BYTES and self.turns and not self._has_turn(self.turns):
                return
            if first.nbytes <= _CHUNK_BYTES:
                self._outgoing.popleft()
            else:
                self._outgoing[0] = first[_CHUNK_BYTES:]
            piece = first[:_CHUNK_BYTES]
            self._count.sent += piece.nbytes
            self._in_turn += piece.nbytes
            self._transport.write(piece)
        if not self._outgoing:
            self._leave_turn()

    def _has_turn(self, turns: Turns) -> bool:
        """Take the turn, or give it to the next after a slice."""
        return turns.take(self) and not (self._in_turn >= _SLICE_BYTES and turns.give(self))


def set_up(sock: Any) -> None:
    """Have a socket send small frames at once, queue little, and notice within seconds that the
    other end is gone.
    """
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_LINE_S),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _DEAD_LINE_S // 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _DEAD_LINE_S // 2),
    ):
        with suppress(OSError, AttributeError):
            sock.setsockopt(level, option, value)


def greeting(number: int) -> dict[str, Any]:
    """Return what the relay of a host says of itself.

    Args:
        number: of its host: a shard sends to the host of the next number first.
    """
    return {"version": VERSION, "relay": number}


def primary_greeting(shard: int) -> dict[str, Any]:
    """Return what a primary says of itself to its standby."""
    return {"version": VERSION, "shard": shard}


def parts_of(arrays: Flat) -> Parts:
    """Return the memory of arrays, in the order of their spaces."""
    return [arrays[space].view("u1").data for space in sorted(arrays) if arrays[space].nbytes]


def check_bytes(parts: Parts, num_bytes: int) -> None:
    """Raise LaneError if the bytes behind a message are not those that belong there."""
    if (expected := sum(part.nbytes for part in parts)) != num_bytes:
        raise LaneError(f"{num_bytes} bytes behind a message, expected {expected}")


def _grow(num_bytes: int) -> Generator[memoryview, Any, bytes]:
    """Yield memory for so many bytes, never much more than have come; return them."""
    taken = bytearray()
    while len(taken) < num_bytes:
        piece = bytearray(min(num_bytes - len(taken), max(_STAGING_BYTES, len(taken))))
        yield memoryview(piece)
        taken += piece
    return bytes(taken)


def _field(content: Mapping[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise LaneError("what came is no handshake")
    return value
