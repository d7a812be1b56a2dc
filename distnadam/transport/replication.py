"""How a primary keeps its standby up: the mean gradient of each round in memory that both map, and
a line that says what to do with it.

A record counts as delivered once it is in the standby's socket: what a process wrote before it died
is still read there, and the mean stays in the memory. The primary writes the next mean only when
the standby is done with the last.
"""

import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event
from typing import Any

import msgpack
import numpy as np

from distnadam.errors import ArenaError, LaneError
from distnadam.protocol.codec import HEADER, pack_record, unpack_record
from distnadam.protocol.supervisor_messages import DetachStandby, Record, ReplicatedRound
from distnadam.tensors.arrays import STATE_ARRAYS, Flat, empty_flat
from distnadam.transport.connection import Address, Connection, Server, call
from distnadam.transport.shared_memory import Arena


class ReplicationStream(ABC):
    """A primary's end of the way to its standby.

    `mean` is where the coming round's mean gradient goes; `reached` is the last round that the
    standby has.
    """

    mean: Flat
    reached: int

    @abstractmethod
    def ready(self) -> bool:
        """Wait until `mean` may be written; False where the standby is gone, or does not keep
        up.
        """

    @abstractmethod
    def send(self, record: Record) -> bool:
        """Deliver a record; False where the standby is gone."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the standby, which learns that it is out of date from now on: the end of its
        primary alone would not say so.
        """


class ShmReplicationStream(ReplicationStream):
    """A standby of the same machine: its arrays are handed over as memory, rounds by a line.

    Args:
        address: where the standby listens.
        arrays: the primary's, of which the standby gets a copy.
        decided: the round they are of.
        timeout_s: seconds after which a standby that is not done with a round is given up.
    """

    def __init__(
        self, address: Address, arrays: Mapping[str, Flat], decided: int, timeout_s: float
    ) -> None:
        sizes = {space: values.size for space, values in arrays["params"].items()}
        copy, shared = Arena.create(sizes, copies=3), Arena.create(sizes)
        for flat, name in zip(copy.flats, STATE_ARRAYS, strict=True):
            for space, values in arrays[name].items():
                np.copyto(flat[space], values)
        self.mean, self._memory = shared.flats[0], shared
        self.reached, self._acknowledged, self._timeout_s = decided, decided, timeout_s
        self._line, _, _ = call(address, {"decided": decided}, [copy.fd, shared.fd])
        self._poll = select.poll()
        self._poll.register(self._line.fileno(), select.POLLIN)

    def ready(self) -> bool:
        """See `ReplicationStream.ready`."""
        deadline = time.monotonic() + self._timeout_s
        while self._acknowledged < self.reached:
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
            frames = self._line.receive()
            if frames is None:
                return False
            for frame in frames:
                self._acknowledged = max(self._acknowledged, int(msgpack.unpackb(frame)))
        return True

    def send(self, record: Record) -> bool:
        """See `ReplicationStream.send`."""
        if not self._line.send(pack_record(record)):
            return False  # it does not read
        if isinstance(record, ReplicatedRound):
            self.reached = record.round
        return not self._hung_up()

    def close(self) -> None:
        """See `ReplicationStream.close`."""
        self._line.send(pack_record(DetachStandby()))
        self._line.close()

    def _hung_up(self) -> bool:
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in self._poll.poll(0))


class StandbyReceiver:
    """A standby's end: takes a copy of the arrays, then records, in the thread that serves its
    socket.

    Args:
        sizes: elements of the shard's ranges per space.
        begin: called with the arrays ("params", "m", "v") once they are there.
        apply: called with each record and the round's mean gradient.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        begin: Callable[[dict[str, Flat]], None],
        apply: Callable[[Record, Flat], None],
    ) -> None:
        self._sizes, self._begin, self._apply = sizes, begin, apply
        self._mean: Flat = empty_flat({})
        self._primary: Connection | None = None
        self.ended = (
            Event()
        )  # set while nobody sends: one that was never filled has nothing to wait for
        self.ended.set()
        self._server = Server(self._greet, self._take, self._end)

    @property
    def address(self) -> Address:
        """Where the primary calls."""
        return self._server.address

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    def _greet(
        self, line: Connection, greeting: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if "decided" not in greeting:
            return {}, []  # a watcher, who only wants to know when this process ends
        if len(fds) != 2:
            raise LaneError(f"expected two arenas, got {len(fds)}")
        try:
            copy = Arena.attach(fds.pop(0), self._sizes, copies=3, writable=True)
            self._mean = Arena.attach(fds.pop(0), self._sizes).flats[0]
        except ArenaError as error:
            raise LaneError(str(error)) from error
        self._primary = line
        self.ended.clear()
        self._begin(dict(zip(STATE_ARRAYS, copy.flats, strict=True)))
        return {}, []

    def _take(self, line: Connection, frame: bytes) -> None:
        record = unpack_record(frame)
        try:
            self._apply(record, self._mean)
        except Exception as error:
            raise LaneError(f"{record} could not be followed: {error}") from error
        if isinstance(record, ReplicatedRound):
            body = msgpack.packb(record.round)
            with suppress(OSError):
                line.send(HEADER.pack(len(body)) + body)

    def _end(self, line: Connection) -> None:
        if line is self._primary:
            self.ended.set()
