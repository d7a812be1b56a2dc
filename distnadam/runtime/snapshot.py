"""A shard's snapshot: copied into memory kept for it while the workers compute, and written to its
file, by a thread of its own.

Whoever is about to change the arrays waits for the copy's end, so the snapshot is of one round.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from threading import Event
from typing import Any

import numpy as np

from distnadam.checkpoint.manifest import FileRecord
from distnadam.checkpoint.shard_file import State
from distnadam.errors import ShardLost
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges
from distnadam.threads import in_background, renew_after_fork


class SnapshotWriter:
    """Copies and writes one snapshot at a time: a second waits until the first is written.

    Args:
        ranges: the shard's.
        arrays: the names of what its state is made of.

    Attributes:
        copied: set while the arrays may be changed; to wait for.
    """

    def __init__(self, ranges: Ranges, arrays: Sequence[str]) -> None:
        self._ranges = ranges
        self._arrays = arrays
        self.memory: State = {}
        self._written: dict[str, Future[FileRecord]] = {}
        self.copied = Event()
        self.copied.set()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Forget a snapshot in flight, which the parent writes."""
        self._written = {}
        self.copied = Event()
        self.copied.set()

    def reserve(self) -> None:
        """Allocate and touch the memory, so that a copy meets no page faults."""
        if not self.memory:
            self.memory = {
                name: {s: np.full(end - begin, 1, s) for s, (begin, end) in self._ranges.items()}
                for name in self._arrays
            }

    def snapshot(
        self, name: str, arrays: dict[str, Flat], write: Callable[[State], FileRecord]
    ) -> None:
        """Begin to copy the arrays, then `write` the copy; `collect` gets the result by name."""
        self.reserve()
        wait_for(self._written.values())
        self._written.clear()
        copied = Event()

        def take() -> FileRecord:
            try:
                for array in self._arrays:
                    for space, values in arrays[array].items():
                        np.copyto(self.memory[array][space], values)
            finally:
                copied.set()
            return write(self.memory)

        self.copied = copied  # the caller holds the shard, so nobody has waited for it yet
        self._written[name] = in_background("saver", take)

    def collect(self, name: str, reply: Callable[[Any], None]) -> None:
        """Call `reply` with the record of a snapshot when it is written, or with its error."""
        written = self._written.get(name)
        if written is None:
            reply(ShardLost(f"{name}: the process that was to write it has been replaced since"))
        else:
            written.add_done_callback(lambda done: reply(done.exception() or done.result()))

    def close(self) -> None:
        """Take no more snapshots; what is being written is written to its end."""
        self.copied.wait()
