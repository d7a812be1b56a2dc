"""Which process to call for which shard: the newest map, and the clients that wait for a newer
one.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from distnadam.errors import Unrecoverable
from distnadam.supervision.process_manager import ShardProcess
from distnadam.tensors.layout import Ranges


@dataclass(frozen=True)
class ShardMap:
    """Which process is which shard.

    Args:
        version: a higher one replaces a lower one.
        shards: the processes, in order.
        cuts: the ranges that each holds.
        failed: why there will be no newer map; None while the optimizer can be recovered.
    """

    version: int
    shards: tuple[ShardProcess, ...]
    cuts: tuple[Ranges, ...] = ()
    failed: str | None = None


def require_alive(shard_map: ShardMap) -> ShardMap:
    """Return the map; raise Unrecoverable if the supervisor gave up."""
    if shard_map.failed is not None:
        raise Unrecoverable(shard_map.failed)
    return shard_map


class ShardMapPublisher:
    """Publishes maps; `now` is the newest. Any thread may call."""

    def __init__(self) -> None:
        self.now = ShardMap(0, ())
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Future[ShardMap]]] = []

    def newer(self, than: int) -> Future[ShardMap]:
        """Return the map once it is newer than that version, or none will be."""
        future: Future[ShardMap] = Future()
        with self._lock:
            if self.now.version > than or self.now.failed:
                future.set_result(self.now)
            else:
                self._waiting = [each for each in self._waiting if not each[1].done()]
                self._waiting.append((than, future))
        return future

    def publish(
        self, shards: Sequence[ShardProcess], cuts: Sequence[Ranges], failed: str | None
    ) -> None:
        """Publish a newer map, or why there will be none any more."""
        with self._lock:
            version = max(time.time_ns(), self.now.version + 1)
            self.now = ShardMap(version, tuple(shards), tuple(cuts), failed)
            ready = [future for than, future in self._waiting if self.now.version > than]
            self._waiting = []
        for future in ready:
            if not future.done():
                future.set_result(self.now)
