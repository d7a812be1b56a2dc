"""A shard's checkpoint files: written from its arrays, at once or in the background, and loaded
into them. It knows no messages' order and no callers.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distnadam.checkpoint.manifest import FileRecord, Manifest
from distnadam.checkpoint.shard_file import State, fill_shard, write_shard
from distnadam.nadam.step_scalars import Clock
from distnadam.places import above, shown
from distnadam.protocol.messages import Save
from distnadam.protocol.supervisor_messages import Load, ShardControlState
from distnadam.runtime.snapshot import SnapshotWriter
from distnadam.shard.state import ShardState
from distnadam.tensors.layout import Ranges


class ShardFiles:
    """Reads and writes the files of one shard.

    Args:
        ranges: the shard's.
        arrays: the names of what its state is made of.

    Attributes:
        directory: the directory of checkpoints last written to or read from; None before.
        snapshots: the background saves, whose copy of the arrays is to be waited for.
    """

    def __init__(self, ranges: Ranges, arrays: Sequence[str]) -> None:
        self.directory: str | None = None
        self._ranges = ranges
        self.snapshots = SnapshotWriter(ranges, arrays)
        self._lock = threading.Lock()
        self._num_saving = 0

    @property
    def is_saving(self) -> bool:
        """Whether arrays are being written, or copied to be written."""
        return self._num_saving > 0

    def reserve(self) -> None:
        """Allocate the memory for a background save."""
        self.snapshots.reserve()

    def save(self, message: Save, arrays: State) -> FileRecord | None:
        """Write a file, and return its record; a background save returns None at once.

        Args:
            message: where to.
            arrays: what to write; a background save copies them first.
        """

        def write(state: State) -> FileRecord:
            record = write_shard(
                message.directory, message.file_name, ranges=self._ranges, state=state
            )
            self.directory = above(message.directory)
            return record

        self._count(1)
        try:
            if not message.behind:
                return write(arrays)
            self.snapshots.snapshot(message.file_name, arrays, write)
            return None
        finally:
            self._count(-1)

    def collect(self, file_name: str, reply: Callable[[Any], None]) -> None:
        """Call `reply` with the record of a background save when it is written, or with its
        error.
        """
        self.snapshots.collect(file_name, reply)

    def load(self, load: Load, state: ShardState) -> ShardControlState:
        """Bring the state that a load names into the arrays, and return the control state of it."""
        if load.state is not None and load.control_state is not None:
            state.load(load.state, load.control_state.active)
            return load.control_state
        new = partial(
            ShardControlState,
            epoch=load.epoch,
            lr=0.0,
            active=0,
            outcome="applied",
            rejection=None,
        )
        if load.directory is None:
            state.load({"params": load.params or {}})
            return new(round=0, skipped=0, clock=Clock(), ledger={"runs": [], "newest": []})
        manifest = Manifest.from_bytes(load.manifest, shown(load.directory))
        saved = manifest.state_arrays
        fill_shard(
            load.directory,
            manifest,
            ranges=self._ranges,
            state={name: flat for name, flat in state.reset().items() if name in saved},
            leftovers=load.leftovers,
        )
        state.settle(begin_average="ema" not in saved)
        self.directory = above(load.directory)
        return new(
            round=manifest.round,
            skipped=manifest.skipped,
            clock=manifest.clock,
            ledger=manifest.ledger,
            loss_scale=manifest.scale_state,
        )

    def close(self) -> None:
        """Take no more background saves; one that is being written is completed."""
        self.snapshots.close()

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_saving += change
