"""How a primary keeps up a standby on another node: by calls that carry arrays as Ray objects, put
into their order where they arrive.
"""

import asyncio
import contextlib
import itertools
import time
from typing import Any

import ray

from distnadam.errors import LaneError
from distnadam.protocol.supervisor_messages import Record, ReplicatedRound, ShardControlState
from distnadam.tensors.arrays import STATE_ARRAYS, Flat, empty_flat
from distnadam.transport.replication import ReplicationStream

_LET_GO_S = 1.0


class ObjectReplicationStream(ReplicationStream):
    """A standby on another node: what it is given travels by Ray objects, and counts once it has
    answered.

    While the first copy is on its way, rounds go on without waiting for it.
    """

    def __init__(
        self,
        standby: Any,
        control_state: ShardControlState,
        config: Any,
        arrays: dict[str, Flat],
        timeout_s: float,
    ) -> None:
        self._standby, self._timeout_s = standby, timeout_s
        self._spaces = sorted(arrays["params"])
        self.mean = empty_flat({space: values.size for space, values in arrays["params"].items()})
        given = [arrays[name][space] for space in self._spaces for name in STATE_ARRAYS]
        self._feed, self._numbers = time.time_ns(), itertools.count(1)
        self._calls = [standby.begin.remote(control_state, config, self._feed, *given)]
        self.reached, self._synced = control_state.round, False

    def ready(self) -> bool:
        """See `ReplicationStream.ready`; a call has copied its arguments."""
        return True

    def send(self, record: Record) -> bool:
        """See `ReplicationStream.send`."""
        means = (
            [self.mean[space] for space in self._spaces]
            if isinstance(record, ReplicatedRound) and record.outcome == "applied"
            else []
        )
        self._calls.append(
            self._standby.replicate.remote(self._feed, next(self._numbers), record, *means)
        )
        try:
            self._synced = self._synced or bool(ray.wait(self._calls[:1], timeout=0)[0])
            if self._synced:
                ray.get(self._calls, timeout=self._timeout_s)
                self._calls = []
        except Exception:  # whatever it is, that standby cannot follow
            return False
        if isinstance(record, ReplicatedRound) and self._synced:
            self.reached = record.round
        return True

    def close(self) -> None:
        """See `ReplicationStream.close`."""
        with contextlib.suppress(
            Exception
        ):  # it is gone, or does not answer; the supervisor hears of that by itself
            ray.get(self._standby.release.remote(self._feed), timeout=_LET_GO_S)


class OrderedStream:
    """Puts the calls of one primary to its standby into their order; a later feed ends an earlier
    one.
    """

    def __init__(self) -> None:
        self._feed, self._next, self._ended = 0, 0, 0
        self._changed = asyncio.Event()

    async def turn(self, feed: int, number: int) -> None:
        """Wait until it is this call's turn; raise LaneError where its feed is over."""
        while True:
            if feed <= self._ended or feed < self._feed:
                raise LaneError("the primary goes on without this standby, or fills it anew")
            if number == 0 or (feed, number) == (self._feed, self._next):
                break
            await self._changed.wait()
        self._feed, self._next = feed, number

    def done(self, number: int) -> None:
        """Have the next call come."""
        self._next = number + 1
        self._wake()

    def end(self, feed: int) -> bool:
        """Let no more call of this feed come; return whether no later one has begun."""
        self._ended = max(self._ended, feed)
        self._wake()
        return feed >= self._feed

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
