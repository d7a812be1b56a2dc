"""How a primary replicates rounds to a standby of the same machine: the mean gradient of each round
in memory that both map, and a record of what to do with it over a socket.

A record counts as delivered once it is in the standby's socket: what a process wrote before it died
can still be read there, and the mean stays in the memory. The primary writes over a mean only once
the standby has acknowledged its round. Unless they are large, means have several places in turn, so
that the next can be written while the standby steps by the last; of a small shard it takes several
rounds at a time.
"""

import select
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Event
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack_record, unpack_record
from distnadam.protocol.frames import frame_of
from distnadam.protocol.supervisor_messages import DetachStandby, Record, ReplicatedRound
from distnadam.tensors.arrays import Flat
from distnadam.transport.connection import Address, Connection, ConnectionServer, connect
from distnadam.transport.shared_memory import Arena

_ROUND = struct.Struct("<q")
"""An acknowledgement: the round that was followed."""
_MOST_PLACES = 16
_MOST_BYTES = 1 << 20
_TWO_MOST_BYTES = 1 << 25
"""Of a shard's means that may wait for its standby: of many, and of two."""
_REST_S = 0.001
"""Seconds in which a standby lets rounds of a small shard gather, which it then takes together: to
be woken for each costs both sides as much as the step.
"""


def _places_of(sizes: Mapping[str, int]) -> int:
    """Return in how many places the means of ranges of these sizes lie in turn."""
    size = sum(np.dtype(space).itemsize * count for space, count in sizes.items())
    many = min(_MOST_PLACES, _MOST_BYTES // max(1, size))
    return many if many > 2 else 2 if 2 * size <= _TWO_MOST_BYTES else 1


class ReplicationStream(ABC):
    """A primary's way to its standby.

    `mean` is where the coming round's mean gradient is written; `reached` is the last round that
    the standby has.
    """

    mean: Flat
    reached: int

    @abstractmethod
    def ready(self) -> bool:
        """Wait until `mean` may be written; return False if the standby died or is too slow."""

    @abstractmethod
    def send(self, record: Record) -> bool:
        """Deliver a record; return False if the standby died or does not read."""

    @abstractmethod
    def close(self) -> None:
        """Tell the standby that it is out of date from now on, and release it.

        The end of its primary's process alone would make it take over.
        """


class ShmReplicationStream(ReplicationStream):
    """A standby of the same machine: it gets the arrays as memory, then rounds over a socket.

    Args:
        address: where the standby listens.
        arrays: the primary's, by name, of which the standby gets a copy.
        decided: the round they are of.
        timeout_s: seconds after which a standby that has not acknowledged a round is given up.
    """

    def __init__(
        self, address: Address, arrays: Mapping[str, Flat], decided: int, timeout_s: float
    ) -> None:
        sizes = {space: values.size for space, values in arrays["params"].items()}
        copy = Arena.create(sizes, copies=len(arrays))
        shared = Arena.create(sizes, copies=_places_of(sizes))
        for flat, array in zip(copy.flats, arrays.values(), strict=True):
            for space, values in array.items():
                np.copyto(flat[space], values)
        self._means = shared.flats
        self.reached = decided
        self.mean = self._means[(decided + 1) % len(self._means)]
        self._acknowledged = decided
        self._timeout_s = timeout_s
        self._connection, _, _ = connect(address, {"decided": decided}, [copy.fd, shared.fd])
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)

    @override
    def ready(self) -> bool:
        needed = self.reached + 1 - len(self._means)  # the round of the mean that is overwritten
        if self._acknowledged >= needed:
            return True
        deadline = time.monotonic() + self._timeout_s
        while True:
            frames = self._connection.receive()
            if frames is None:
                return False
            if frames:
                self._acknowledged = max(self._acknowledged, *_ROUND.unpack(frames[-1]))
            if self._acknowledged >= needed:
                return True
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False

    @override
    def send(self, record: Record) -> bool:
        if not self._connection.send(pack_record(record)):
            return False  # it does not read
        if isinstance(record, ReplicatedRound):
            self.reached = record.round
            self.mean = self._means[(record.round + 1) % len(self._means)]
        return not self._connection.is_broken

    @override
    def close(self) -> None:
        self._connection.send(pack_record(DetachStandby()))
        self._connection.close()


class StandbyReceiver:
    """A standby's end: takes a copy of the arrays, then records, in the thread of its server.

    `ended` is set while no primary sends; one that was never filled has nothing to wait for.

    Args:
        sizes: elements of the shard's ranges per space.
        arrays: the names of what the state is made of.
        begin: called with the arrays by name once they are there.
        apply: called with each record and the round's mean gradient.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        arrays: Sequence[str],
        begin: Callable[[dict[str, Flat]], None],
        apply: Callable[[Record, Flat], None],
    ) -> None:
        self._sizes = sizes
        self._arrays = arrays
        self._begin = begin
        self._apply = apply
        self._means: Sequence[Flat] = ()
        self._primary: Connection | None = None
        self.ended = Event()
        self.ended.set()
        places = _places_of(sizes)
        self._acknowledges_each = max(1, places // 4)
        rest_s = _REST_S if places > 2 else 0.0
        self._server = ConnectionServer(self._greet, self._take, self._end, rest_s=rest_s)

    @property
    def address(self) -> Address:
        """Where a primary connects."""
        return self._server.address

    def close(self) -> None:
        """Stop listening and close the connections."""
        self._server.close()

    def _greet(
        self, connection: Connection, greeting: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if "decided" not in greeting:
            return {}, []  # a watcher, which only waits for the end of this process
        if len(fds) != 2:
            raise LaneError(f"expected two arenas, got {len(fds)}")
        copy = Arena.attach(fds.pop(0), self._sizes, copies=len(self._arrays), writable=True)
        places = _places_of(self._sizes)
        self._means = Arena.attach(fds.pop(0), self._sizes, copies=places).flats
        self._primary = connection
        self.ended.clear()
        self._begin(dict(zip(self._arrays, copy.flats, strict=True)))
        return {}, []

    def _take(self, connection: Connection, frame: bytes) -> None:
        record = unpack_record(frame)
        number = record.round if isinstance(record, ReplicatedRound) else 0
        try:
            self._apply(record, self._means[number % len(self._means)])
        except Exception as error:
            raise LaneError(f"{record} could not be followed: {error}") from error
        if number and number % self._acknowledges_each == 0:
            with suppress(OSError):
                connection.send(frame_of(_ROUND.pack(number)))

    def _end(self, connection: Connection) -> None:
        if connection is self._primary:
            self.ended.set()
