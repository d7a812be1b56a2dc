"""A worker's end of its connections to shards of other hosts."""

import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import override

from distnadam.errors import DistNadamError, LaneError
from distnadam.protocol.codec import HEADER, pack, unpack
from distnadam.protocol.messages import Push, RoundResult, TotalNorms
from distnadam.tensors.arrays import Dtypes, empty_flat
from distnadam.tensors.layout import Ranges, sizes_of
from distnadam.transport.tcp_connection import (
    HANDSHAKE_S,
    Endpoint,
    Parts,
    Receiver,
    TcpConnection,
    check_bytes,
    greeting,
    parts_of,
)
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.turns import place_after


class TcpClient:
    """One worker's connections, one to each shard that it reaches so.

    Args:
        rank: the worker's rank.
        incarnation: the worker's incarnation.
        pull_dtypes: the layout's; None for the spaces' own.
    """

    def __init__(self, rank: int, incarnation: int, pull_dtypes: Dtypes | None = None) -> None:
        self.pull_dtypes = pull_dtypes
        self._rank = rank
        self._incarnation = incarnation
        self._lines: dict[int, _Line] = {}
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._number = 0
        self._asked: dict[int, _Line] = {}
        self._answers: dict[int, Any] = {}

    def __contains__(self, shard: int) -> bool:
        return shard in self._lines

    def open(self, shard: int, endpoint: Endpoint, ranges: Ranges) -> None:
        """Connect to a shard in place of an earlier connection.

        Raises:
            LaneError: nobody answers there, or it does not know the secret.
        """
        self.drop(shard)
        line = _Line(self, shard, ranges)
        try:
            line.open(endpoint, greeting(self._rank, self._incarnation))
        except (OSError, TimeoutError, LaneError) as error:
            line.close("it was not opened in time")
            raise LaneError(
                f"shard {shard} cannot be reached at {endpoint.host} port {endpoint.port}: {error}"
            ) from error
        with self._changed:
            if line.why is None:
                self._lines[shard] = line

    def drop(self, shard: int) -> None:
        """Close the connection to a shard, if any; what it was asked counts as lost."""
        if (line := self._lines.get(shard)) is not None:
            self.lost(line)
            line.close("it is needed no more")

    def reset(self, incarnation: int) -> None:
        """Close all connections; open later ones as this incarnation."""
        self.close()
        self._incarnation = incarnation

    def post(self, messages: Mapping[int, Push | TotalNorms]) -> int:
        """Send each shard its message; return the number for `collect`.

        A connection that still sends an earlier message is dropped: that one's arrays may change.
        """
        for shard in messages:
            if shard in self._lines and self._lines[shard].connection.is_sending:
                self.drop(shard)
        with self._changed:
            self._number = next(self._numbers)
            self._answers = {}
            self._asked = {shard: self._lines[shard] for shard in messages if shard in self._lines}
        # each worker begins with another shard, so that not all send to one at once
        for shard in sorted(self._asked, key=lambda shard: (shard <= self._rank, shard)):
            message = messages[shard]
            gradients = message.gradients if isinstance(message, Push) else None
            body = pack(self._number, message)[HEADER.size :]
            self._asked[shard].send(body, parts_of(gradients or {}))
        return self._number

    def collect(self, number: int, shards: Mapping[int, Any], deadline: float) -> dict[int, Any]:
        """Return the shards' answers to the messages of that number; None where the line was lost.

        Raises:
            DistNadamError: what the first shard that refused raised.
            TimeoutError: not all answered before the deadline (of `time.monotonic`); may be called
                again.
        """
        with self._changed:
            while True:
                answers = dict(self._answers) if number == self._number else {}
                asked = self._asked if number == self._number else {}
                for shard in shards:
                    if shard not in asked or self._lines.get(shard) is not asked[shard]:
                        answers.setdefault(shard, None)
                for answer in answers.values():
                    if isinstance(answer, DistNadamError):
                        raise answer
                if len(answers) == len(shards):
                    return answers
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                self._changed.wait(left)

    def answered(self, line: "_Line", number: int, answer: Any) -> None:
        """Take an answer, in the loop's thread."""
        with self._changed:
            if number == self._number:
                self._answers[line.shard] = answer
                self._changed.notify_all()

    def lost(self, line: "_Line") -> None:
        """Learn that a line has ended, in any thread."""
        with self._changed:
            if self._lines.get(line.shard) is line:
                del self._lines[line.shard]
            self._changed.notify_all()

    def close(self) -> None:
        """Close the connections."""
        for shard in list(self._lines):
            self.drop(shard)


class _Line(Receiver):
    """The connection to one shard."""

    connection: TcpConnection

    def __init__(self, client: TcpClient, shard: int, ranges: Ranges) -> None:
        self._client = client
        self._sizes = sizes_of(ranges)
        self._thread = dialling_thread()
        self._settled = threading.Event()
        self.shard = shard
        self.why: str | None = None
        """Why it has ended; None while it is open."""

    def open(self, endpoint: Endpoint, greeting: Mapping[str, Any]) -> None:
        self.connection = TcpConnection(self, endpoint.secret, greeting)
        self.connection.place = place_after(greeting["rank"], self.shard)
        dial(self.connection, endpoint)
        if not self._settled.wait(HANDSHAKE_S):
            raise LaneError("it does not prove itself")
        if self.why is not None:
            raise LaneError(self.why)

    def send(self, message: bytes, parts: Parts) -> None:
        self._thread.call(self.connection.send, message, parts)

    def close(self, why: str) -> None:
        if hasattr(self, "connection"):
            self._thread.call(self.connection.close, why)

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        self._settled.set()

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        number, answer = unpack(message)
        parts: Parts = ()
        if isinstance(answer, RoundResult):
            parameters = empty_flat(self._sizes, self._client.pull_dtypes)
            parts = parts_of(parameters)
            answer = replace(answer, parameters=parameters)
        check_bytes(parts, num_bytes)
        return (number, answer), parts

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        number, answer = what
        self._client.answered(self, number, answer)

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        self.why = why
        self._settled.set()
        self._client.lost(self)
