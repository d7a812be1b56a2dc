"""A connection's bytes without a socket: what both ends say, bytes that went wrong, and what a
second parser, as slow and plain as can be, makes of them.
"""

import hashlib
import hmac
import itertools
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.frames import HEADER, VERSION
from distnadam.protocol.messages import Leave, Push, RoundResult, TotalNorms
from distnadam.tensors.arrays import Flat
from distnadam.transport.tcp_connection import TcpConnection, check_bytes, greeting, parts_of

SECRET = b"s" * 32
GREETING = greeting(0)
HEAD = struct.Struct("<IQ")
MOST_UNPROVEN, MOST_MESSAGE = 1 << 10, 1 << 28
SIZES = {"float32": 20, "float64": 3}
WHOLE = itertools.repeat(1 << 30)
"""Pieces as large as there is room."""


class Wire:
    """What a connection does with its transport, and nothing more."""

    def __init__(self) -> None:
        self.sent = b""
        self.aborted = False

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        assert (high, low) == (1, 0)

    def get_extra_info(self, name: str) -> Any:
        return {"socket": self, "peername": ("10.0.0.2", 7000)}[name]

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert value > 0

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def abort(self) -> None:
        self.aborted = True

    def take(self) -> bytes:
        """Return what was sent since the last call."""
        sent, self.sent = self.sent, b""
        return sent


@dataclass
class Sink:
    """A receiver that notes the messages that come, and lands arrays as a shard does."""

    proofs: int = 0
    messages: list[tuple[bytes, bytes]] = field(default_factory=list)

    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        self.proofs += 1

    def landing(self, connection: TcpConnection, message: bytes, num_bytes: int) -> Any:
        parts = parts_of(arrays_behind(message))
        check_bytes(parts, num_bytes)
        return (message, parts), parts

    def arrived(self, connection: TcpConnection, what: Any) -> None:
        message, parts = what
        self.messages.append((message, b"".join(map(bytes, parts))))

    def ended(self, connection: TcpConnection, why: str) -> None:
        raise AssertionError("a wire has no end")


def arrays_behind(message: bytes) -> Flat:
    """Return memory for the arrays behind a message; raise LaneError if it is none."""
    _, what = unpack(message, _land)
    return what.gradients or {} if isinstance(what, Push) else {}


def _land(dtypes: Mapping[str, str]) -> Flat:
    if not set(dtypes) <= set(SIZES):
        raise LaneError(f"gradients of {dtypes!r:.100}")
    return {space: np.zeros(SIZES[space], name) for space, name in dtypes.items()}


def frame(message: bytes, behind: bytes = b"") -> bytes:
    return HEAD.pack(len(message), len(behind)) + message + behind


def said(content: Any) -> bytes:
    """Return the frame of a handshake."""
    return frame(msgpack.packb(content))


def hello(theirs: bytes, ours: bytes = b"w" * 32, **other: Any) -> bytes:
    """Return what a worker says to a shard's nonce, with `other` things in its greeting."""
    text = msgpack.packb({**GREETING, **other})
    proof = hmac.digest(SECRET, b"worker\0" + theirs + ours + text, hashlib.sha256)
    return said({"nonce": ours, "greeting": text, "proof": proof})


def proof_of_shard(heard: bytes, ours: bytes) -> bytes:
    """Return what a shard of that nonce says to what a worker says."""
    content = msgpack.unpackb(heard[HEAD.size :])
    text = b"shard\0" + content["nonce"] + ours + content["greeting"]
    return said({"proof": hmac.digest(SECRET, text, hashlib.sha256)})


def made(connection: TcpConnection) -> Wire:
    """Return the wire of a new connection."""
    wire = Wire()
    connection.connection_made(wire)  # type: ignore[arg-type]
    return wire


def new_shards_end(**other: Any) -> tuple[TcpConnection, Sink, Wire, bytes]:
    """Return a shard's end, and the worker's hello that it expects."""
    sink = Sink()
    connection = TcpConnection(sink, SECRET)
    wire = made(connection)
    nonce = msgpack.unpackb(wire.take()[HEAD.size :])["nonce"]
    return connection, sink, wire, hello(nonce, **other)


def new_workers_end() -> tuple[TcpConnection, Sink, Wire, bytes]:
    """Return a worker's end that has heard a nonce, and the shard's proof that it expects."""
    sink = Sink()
    connection = TcpConnection(sink, SECRET, GREETING)
    wire = made(connection)
    nonce = b"n" * 32
    feed(connection, wire, said({"version": VERSION, "nonce": nonce}), WHOLE)
    return connection, sink, wire, proof_of_shard(wire.take(), nonce)


def feed(connection: TcpConnection, wire: Wire, data: bytes, pieces: Iterator[int]) -> None:
    """Give a connection bytes in pieces, as a transport does, until it hangs up."""
    while data and not wire.aborted:
        room = connection.get_buffer(-1)
        assert len(room) > 0
        count = min(len(room), len(data), next(pieces))
        room[:count] = data[:count]
        connection.buffer_updated(count)
        data = data[count:]


@dataclass(frozen=True)
class Expected:
    """What an end makes of bytes."""

    proven: bool
    messages: list[tuple[bytes, bytes]]
    hangs_up: bool


def parse(data: bytes, handshake: bytes) -> Expected:
    """Return what an end makes of bytes that should begin with a handshake."""
    proven, messages, at = False, list[tuple[bytes, bytes]](), 0
    while len(data) - at >= HEAD.size:
        num_bytes, behind = HEAD.unpack_from(data, at)
        if num_bytes > (MOST_MESSAGE if proven else MOST_UNPROVEN) or (behind and not proven):
            return Expected(proven, messages, True)
        begin, middle = at + HEAD.size, at + HEAD.size + num_bytes
        if len(data) < middle:
            break
        if proven:
            message = data[begin:middle]
            try:
                check_bytes(parts_of(arrays_behind(message)), behind)
            except LaneError:
                return Expected(proven, messages, True)
            if len(data) < middle + behind:
                break
            messages.append((message, data[middle : middle + behind]))
        elif data[:middle] == handshake:
            proven = True
        else:
            return Expected(proven, messages, True)
        at = middle + behind
    return Expected(proven, messages, False)


def conversation(rng: random.Random) -> list[bytes]:
    """Return frames of all kinds that follow a handshake."""
    return [rng.choice(FRAMES) for _ in range(rng.randrange(4))]


def _frames() -> list[bytes]:
    messages: list[Any] = [Leave(0, 1), LaneError("no"), LaneError("long" * 3000)]
    place = {"epoch": 1, "rank": 0, "incarnation": 1, "round": 2}
    arrays = [
        None,
        {"float32": np.ones(20, "f4")},
        {"float32": np.ones(20, "f4"), "float64": np.ones(3)},
    ]
    messages += [
        Push(**place, gradients=each, rejection=None if each else "no", want_parameters=True)
        for each in arrays
    ]
    sums = np.arange(9.0)
    messages.append(TotalNorms(**place, square_sums=sums, want_parameters=True))
    decided = {"epoch": 1, "round": 1, "iterations": 1, "lr": 0.1, "buffer": 0, "rejection": None}
    messages.append(RoundResult(**decided, outcome="applied"))
    return [
        frame(
            pack(7, message)[HEADER.size :],
            b"".join(map(bytes, parts_of(getattr(message, "gradients", None) or {}))),
        )
        for message in messages
    ]


FRAMES = _frames()
_DEEP = b"\x91" * 900 + b"\xc0"
_BOMBS = [
    *(kind + b"\xff" * 4 for kind in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")),
    *(kind + b"\x7f\xff\xff\xff" for kind in (b"\xdd", b"\xdf", b"\xc6")),
    _DEEP,
    _DEEP * 40,
    b"\x81" * 1000,
    b"\xd6\xff" + bytes(4),
    msgpack.packb([1, "push", [[]], {}, {"a": 1}, None, {"float32": []}, None]),
    msgpack.packb([{}, "norms", 1, 0, 1, 2, "sums"]),
    msgpack.packb({"nonce": b"", "greeting": b"", "proof": b""}),
]
"""Messages that announce more than there is, nest deep, or have other types than they should."""
_HUGE = [1 << 10, (1 << 10) + 1, 1 << 16, (1 << 28) - 1, 1 << 28, (1 << 28) + 1, (1 << 32) - 1]


def spoiled(frames: Sequence[bytes], rng: random.Random) -> bytes:
    """Return the bytes of frames after one to three things went wrong."""
    spoilt = list(frames)
    whole = list(_OF_FRAMES)
    for _ in range(rng.randrange(3)):
        rng.choice(whole)(spoilt, rng)
    data = bytearray(b"".join(spoilt))
    for _ in range(rng.randrange(3)):
        rng.choice(_OF_BYTES)(data, rng)
    return bytes(data)


def _repeat(frames: list[bytes], rng: random.Random) -> None:
    frames.insert(rng.randrange(len(frames) + 1), rng.choice(frames))


def _swap(frames: list[bytes], rng: random.Random) -> None:
    one, other = rng.randrange(len(frames)), rng.randrange(len(frames))
    frames[one], frames[other] = frames[other], frames[one]


def _leave_out(frames: list[bytes], rng: random.Random) -> None:
    if len(frames) > 1:
        del frames[rng.randrange(len(frames))]


def _bomb(frames: list[bytes], rng: random.Random) -> None:
    frames.insert(rng.randrange(len(frames) + 1), frame(rng.choice(_BOMBS)))


def _lie_of_length(frames: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(frames))
    length, behind = HEAD.unpack_from(frames[at].ljust(HEAD.size, b"\0"))
    if rng.random() < 0.5:
        length = rng.choice([*_HUGE, max(0, length - 1), length + 1])
    else:
        behind = rng.choice([*_HUGE, 1 << 40, (1 << 64) - 1, max(0, behind - 1), behind + 1])
    frames[at] = HEAD.pack(length % (1 << 32), behind % (1 << 64)) + frames[at][HEAD.size :]


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _lose(data: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(data) + 1)
    del data[begin : begin + rng.randrange(1, 20)]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randrange(60))


def _double(data: bytearray, rng: random.Random) -> None:
    data += bytes(data)


_OF_FRAMES = (_repeat, _swap, _leave_out, _bomb, _lie_of_length)
_OF_BYTES = (_flip, _flip, _cut, _lose, _insert, _double)
