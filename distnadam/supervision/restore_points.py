"""What all shards can go back to: the newest checkpoint they can read, or the parameters given to
`build`.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.shard_file import leftover_readers
from distnadam.checkpoint.storage.base import Directory
from distnadam.errors import CheckpointError
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.tensors.arrays import Flat, cut_flat

log = logging.getLogger("distnadam")


class RestorePoints:
    """See the module.

    Args:
        directory: where checkpoints are looked for; None: where the last one was saved.
        retain_initial: whether parameters are kept until there is a checkpoint.
    """

    def __init__(self, directory: str | None, *, retain_initial: bool) -> None:
        self._fixed = self.directory = directory
        self._retain_initial = retain_initial
        self.initial: Flat | None = None
        self.changed: str | None = None
        self.changes = 0

    @property
    def present(self) -> bool:
        """Whether there is anything to go back to."""
        return self.initial is not None or self.directory is not None

    def begin(self, initial: Flat | None, directory: str | None) -> None:
        """Take what the shards began with, as far as it is known."""
        self.initial = initial if initial is not None and self._retain_initial else self.initial
        self.directory = self._fixed or directory or self.directory

    def change(self, what: str) -> None:
        """Take that the state is about to be replaced from outside."""
        self.changed, self.changes = what, max(time.time_ns(), self.changes + 1)

    def saved(self, root: str, changes: int) -> None:
        """Take that a checkpoint is complete: it makes good whatever was changed before it, and the
        first parameters are not needed.
        """
        self.directory, self.initial = self._fixed or root, None
        if changes == self.changes:
            self.changed = None

    def candidates(self) -> list[Directory | Flat]:
        """Return what could be loaded, best first."""
        found: list[Directory | Flat] = []
        if self.directory is not None:
            try:
                found += reversed(store.step_directories(self.directory))
            except CheckpointError as error:
                log.warning("no checkpoint can be looked for: %s", error)
        return found + ([self.initial] if self.initial is not None else [])

    def loads(
        self, candidate: Directory | Flat, specs: Sequence[ShardSpec], epoch: int, **how: Any
    ) -> dict[int, Load]:
        """Return the order that has each shard load its part; none where the checkpoint is
        refused.
        """
        if not isinstance(candidate, Directory):
            return {
                i: Load(epoch=epoch, params=cut_flat(candidate, spec.ranges), **how)
                for i, spec in enumerate(specs)
            }
        try:
            manifest = store.load(candidate)
            store.check_files(candidate, manifest)
        except CheckpointError as error:
            log.warning("passing over %s", error)
            return {}
        raw, leftovers = manifest.to_bytes(), leftover_readers(manifest, len(specs))
        return {
            i: Load(
                epoch=epoch, directory=str(candidate), manifest=raw, leftovers=tuple(left), **how
            )
            for i, left in enumerate(leftovers)
        }
