"""Looks at the shards of a run between its segments: where they stand, and how long a step takes.

A look costs some milliseconds on Ray and some tens of microseconds in this process, so they are
rare: they take one part in `_SHARE` of the time.
"""

import time
from contextlib import suppress

from distnadam.backends.base import WorkerGroup
from distnadam.client.shard_group import ShardGroup
from distnadam.client.status import RunningOptimizer, Status
from distnadam.errors import DistNadamError
from distnadam.training.callbacks import Callback

_SHARE = 500
_AT_MOST_EVERY_S = 1.0
"""As often as the panel is drawn."""
_FEW_ROUNDS = 20
"""The first ones, which are slow: until as many are seen, each segment is looked at."""


class Watch:
    """Reports the status of the shards, and their recoveries, to callbacks.

    Args:
        shards: the run's.
        group: its ranks.
        callbacks: get what is seen.

    Attributes:
        apply_s: seconds of the slowest shard's step, the mean since the look before the last.
    """

    def __init__(self, shards: ShardGroup, group: WorkerGroup, callbacks: Callback) -> None:
        self.apply_s = 0.0
        self._shards = shards
        self._group = group
        self._callbacks = callbacks
        self._running: RunningOptimizer | None = None
        self._seen: Status | None = None
        self._next = 0.0
        self._rounds = 0  # seen so far

    def look(self, step: int) -> None:
        """Look, if it is time for it, between two segments; a shard that is silent is no error."""
        began = time.monotonic()
        if began < self._next and self._rounds >= _FEW_ROUNDS:
            return
        with suppress(DistNadamError, TimeoutError):
            self._running = self._running or RunningOptimizer.of(self._shards)
            self._take(step, self._running.status(self._seen))
        now = time.monotonic()
        self._next = now + max(_AT_MOST_EVERY_S, _SHARE * (now - began))

    def _take(self, step: int, status: Status) -> None:
        before, self._seen = self._seen, status
        if before is not None:
            if (rounds := status.round - before.round) > 0:
                then = {shard.index: shard.stepped_s for shard in before.shards}
                spent = [
                    shard.stepped_s - (then.get(shard.index) or 0.0)
                    for shard in status.shards
                    if shard.stepped_s is not None
                ]
                # a process that is new since then has a count of its own
                self.apply_s = max([0.0, *spent]) / rounds
                self._rounds += rounds
            if status.recoveries > before.recoveries:
                what = "all shards went back" if status.is_rewound else "a standby took over"
                self._callbacks.on_recovery(step, "shards", what)
        self._callbacks.on_status(status, self._group.hosts())
