"""How a primary replicates rounds to a standby of the same machine: its state in memory that both
map, every array twice, and a record of each round over a socket.

A step writes the copy that the last record does not name. A record counts as delivered once it is
in the standby's socket: what a process wrote before it died can still be read there, and the arrays
that it names stay whole, since the next step's record names the others. So the standby computes
nothing, and does not wake for each round.
"""

import select
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any

from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack_record, unpack_record
from distnadam.protocol.frames import frame_of
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import DetachStandby, Record, ReplicatedRound
from distnadam.tensors.arrays import Flat
from distnadam.transport.replication import ReplicationStream
from distnadam.transport.shared_memory import Arena
from distnadam.transport.state_memory import map_states
from distnadam.transport.unix_connection import Address, Connection, ConnectionServer, connect

_ROUND = struct.Struct("<q")
"""An acknowledgement: the round that was followed."""
_MOST_AHEAD = 16
"""Rounds that the standby has not acknowledged at most, so that its socket never fills."""
_REST_S = 0.001
"""Seconds in which a standby lets rounds gather, which it then takes together: to be woken for each
costs both sides as much as a small step.
"""


class ShmReplicationStream(ReplicationStream):
    """A standby of the same machine: it gets the state as memory, then rounds over a socket.

    Args:
        address: where the standby listens.
        state: the arena that the primary's state is kept in twice.
        parameters: the arena of its parameter buffers.
        decided: the round that the primary has decided.
        timeout_s: seconds after which a standby that has not acknowledged a round is given up.
    """

    def __init__(
        self, address: Address, state: Arena, parameters: Arena, decided: int, timeout_s: float
    ) -> None:
        self.reached = decided
        self._acknowledged = decided
        self._timeout_s = timeout_s
        self._connection, _, _ = connect(address, {"decided": decided}, [state.fd, parameters.fd])
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)

    @override
    def ready(self) -> bool:
        needed = self.reached + 1 - _MOST_AHEAD
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
        return not self._connection.is_broken

    @override
    def close(self) -> None:
        self._connection.send(pack_record(DetachStandby()))
        self._connection.close()


class StandbyReceiver:
    """A standby's end: takes the memory of the state, then records, in the thread of its server.

    `ended` is set while no primary sends; one that was never filled has nothing to wait for.

    Args:
        spec: the shard's spec.
        begin: called with the arrays by name, by the index of the current buffer.
        apply: called with each record, and no mean gradient.
    """

    def __init__(
        self,
        spec: ShardSpec,
        begin: Callable[[tuple[dict[str, Flat], dict[str, Flat]]], None],
        apply: Callable[[Record, Flat | None], None],
    ) -> None:
        self._spec = spec
        self._begin = begin
        self._apply = apply
        self._primary: Connection | None = None
        self.ended = Event()
        self.ended.set()
        self._server = ConnectionServer(self._greet, self._take, self._end, rest_s=_REST_S)

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
        parameters = fds.pop()
        states = map_states(self._spec, fds.pop(), parameters)
        self._primary = connection
        self.ended.clear()
        self._begin(states)
        return {}, []

    def _take(self, connection: Connection, frame: bytes) -> None:
        record = unpack_record(frame)
        number = record.round if isinstance(record, ReplicatedRound) else 0
        try:
            self._apply(record, None)
        except Exception as error:
            raise LaneError(f"{record} could not be followed: {error}") from error
        if number and number % (_MOST_AHEAD // 4) == 0:
            with suppress(OSError):
                connection.send(frame_of(_ROUND.pack(number)))

    def _end(self, connection: Connection) -> None:
        if connection is self._primary:
            self.ended.set()
