"""How a primary replicates rounds to a standby on another node: calls that carry arrays as Ray
objects, put back into their order where they arrive.
"""

import asyncio
import contextlib
import itertools
import time
from typing import Any

import ray
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.supervisor_messages import Record, ReplicatedRound, ShardControlState
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.transport.replication import ReplicationStream

PIECE_ELEMENTS = 1 << 24
"""The elements of the state that go by one call, so that each is answered within the time."""
_RELEASE_S = 1.0


class ObjectReplicationStream(ReplicationStream):
    """A standby on another node: a record counts as delivered once the standby has answered.

    Rounds go on once the standby has the state: one that lacks rounds which were announced must not
    be there to take over.

    Args:
        standby: its actor.
        control_state: the primary's, at the round of the arrays.
        config: the primary's NadamConfig.
        arrays: the primary's, by name, which are copied.
        timeout_s: seconds after which a standby that has not answered a call is given up.

    Raises:
        RayError, DistNadamError: it is dead, or does not answer.
    """

    def __init__(
        self,
        standby: Any,
        control_state: ShardControlState,
        config: Any,
        arrays: dict[str, Flat],
        timeout_s: float,
    ) -> None:
        self._standby = standby
        self._timeout_s = timeout_s
        self._spaces = sorted(arrays["params"])
        sizes = {space: values.size for space, values in arrays["params"].items()}
        self.mean = self._mean = empty_flat(sizes)
        self._id = time.time_ns()  # later than any earlier stream's, another primary's included
        self._numbers = itertools.count()
        try:
            for name, flat in arrays.items():
                for space in self._spaces:
                    for begin in range(0, max(1, flat[space].size), PIECE_ELEMENTS):
                        piece = flat[space][begin : begin + PIECE_ELEMENTS]
                        self._call(standby.fill, name, space, begin, piece)
            self._call(standby.begin_by_calls, control_state, config)
        except BaseException:
            self.close()  # it may have begun to follow
            raise
        self.reached = control_state.round

    def _call(self, method: Any, *args: Any) -> None:
        ray.get(method.remote(self._id, next(self._numbers), *args), timeout=self._timeout_s)

    @override
    def ready(self) -> bool:
        """Return True: a call has copied its arguments."""
        return True

    @override
    def send(self, record: Record) -> bool:
        means = (
            [self._mean[space] for space in self._spaces]
            if isinstance(record, ReplicatedRound) and record.outcome == "applied"
            else []
        )
        try:
            self._call(self._standby.replicate, record, *means)
        except Exception:  # whatever it is, this standby cannot follow
            return False
        if isinstance(record, ReplicatedRound):
            self.reached = record.round
        return True

    @override
    def close(self) -> None:
        with contextlib.suppress(Exception):  # it died or is silent; the supervisor notices
            ray.get(self._standby.release.remote(self._id), timeout=_RELEASE_S)


class OrderedStream:
    """Puts the calls of a primary to its standby into their order.

    A stream has an id, and its calls numbers from 0; a stream with a higher id ends an earlier one.
    """

    def __init__(self) -> None:
        self._stream = 0
        self._next = 0
        self._ended = 0
        self._changed = asyncio.Event()

    async def turn(self, stream: int, number: int) -> None:
        """Wait until it is this call's turn; raise LaneError if its stream ended."""
        while True:
            if stream <= self._ended or stream < self._stream:
                raise LaneError("the primary goes on without this standby, or fills it again")
            if number == 0 or (stream, number) == (self._stream, self._next):
                break
            await self._changed.wait()
        self._stream = stream
        self._next = number

    def done(self, number: int) -> None:
        """Give the turn to the call after `number`."""
        self._next = number + 1
        self._wake()

    def end(self, stream: int) -> bool:
        """Refuse further calls of this stream; return whether no later stream has begun."""
        self._ended = max(self._ended, stream)
        self._wake()
        return stream >= self._stream

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
