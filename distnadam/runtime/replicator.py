"""A primary's side of replication: every record goes to its standby, if it has one, and a standby
that cannot keep up is detached. How records travel, `ReplicationStream` knows.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.supervisor_events import StandbyLost
from distnadam.protocol.supervisor_messages import DetachStandby, ShardControlState
from distnadam.shard.effects import Replicate
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Flat
from distnadam.transport.replication import ReplicationStream

log = logging.getLogger("distnadam")

ConnectStandby = Callable[[Any, ShardControlState, NadamConfig, ShardState], ReplicationStream]
"""From what `AttachStandby` carries, the shard's control state, config and state, to a stream."""


class Replicator:
    """The standby of one shard, attached or not. Any thread may call.

    Args:
        shard: the shard's index, for the log.
        on_lost: called when a standby is detached because it is gone or out of date, or because
            another follows in its place.

    Attributes:
        stream: to the standby; None without one.
    """

    def __init__(self, shard: int, on_lost: Callable[[StandbyLost], None]) -> None:
        self._shard = shard
        self._on_lost = on_lost
        self.stream: ReplicationStream | None = None
        self._standby: Any = None  # whose that is
        self._lock = threading.Lock()

    @property
    def reached(self) -> int | None:
        """The last round that the standby has; None without one."""
        stream = self.stream
        return None if stream is None else stream.reached

    def release(self, standby: Any) -> None:
        """Detach this standby, which is to be filled again."""
        if self._standby == standby:
            self.close()

    def attach(self, stream: ReplicationStream, standby: Any) -> ReplicationStream | None:
        """Send every record from now on to this stream, of this standby; return the stream of the
        one that has followed until now, to be closed.
        """
        with self._lock:
            before, self.stream = self.stream, stream
            replaced, self._standby = self._standby, standby
        if before is not None:
            self._on_lost(StandbyLost(shard=self._shard, standby=replaced))
        return before

    def replicate(self, effect: Replicate) -> None:
        """Send a record; detach the standby if it is gone, or if the record says so."""
        stream = self.stream
        if stream is None:
            return
        if isinstance(effect.record, DetachStandby) or not stream.send(effect.record):
            self._lose(stream)

    def memory_for_mean(self) -> Flat | None:
        """Wait until the standby can take another round, and return where the mean gradient is to
        be written for it; None if it needs none, or no standby keeps up.
        """
        stream = self.stream
        if stream is None:
            return None
        if not stream.ready():
            self._lose(stream)
            return None
        return stream.mean

    def close(self) -> None:
        """Detach the standby, if any."""
        if (stream := self.stream) is not None:
            self._detach(stream)

    def _lose(self, stream: ReplicationStream) -> None:
        """Detach a standby, and report that the shard lacks one, unless another thread has."""
        standby = self._standby
        if self._detach(stream):
            log.warning(
                "shard %d: its standby is gone or out of date; a new one will be filled",
                self._shard,
            )
            self._on_lost(StandbyLost(shard=self._shard, standby=standby))

    def _detach(self, stream: ReplicationStream) -> bool:
        """Detach a standby; return False if another thread has detached it already."""
        with self._lock:
            if self.stream is not stream:
                return False
            self.stream = None
        stream.close()
        return True
