"""The checkpoints of one run of `fit`: written behind the training, reported when they are
complete, old ones removed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.run_lock import RunLock
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.client.checkpointing import CheckpointWriter
from distnadam.errors import CheckpointError, RayLost, ShardLost
from distnadam.optimizer import DistNadam
from distnadam.training.run_plan import RetentionPolicy


class CheckpointManager:
    """Saves during one run of `fit`, deletes old checkpoints, and reports both.

    Args:
        saves: the optimizer's own record of the save in flight.
        lock: held on the directory of checkpoints.
        keep: which of them stay.
        on_save: gets the step and the checkpoint, once it is complete.
        on_message: gets what else the user should know.
    """

    def __init__(
        self,
        saves: CheckpointWriter,
        lock: RunLock,
        keep: RetentionPolicy,
        on_save: Callable[[int, Path | str], None],
        on_message: Callable[[str], None],
    ) -> None:
        self._saves = saves
        self._lock = lock
        self._directory = lock.directory
        self._keep = keep
        self._on_save = on_save
        self._on_message = on_message

    def save(self, optimizer: DistNadam, step: int, *, data: dict[str, Any], wait: bool) -> None:
        """Save, with data beside the state, after waiting for an earlier save.

        Raises:
            CheckpointBusy: another run has taken the directory over.
        """
        self.finish()
        self._lock.check()
        saved = optimizer.save(self._directory, wait=wait, data=data)
        if isinstance(saved, str):
            self._complete(step, saved)

    def poll(self) -> None:
        """Report the save in flight if it has ended."""
        if self._saves.is_complete:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight and report it; do without it if a shard died meanwhile."""
        self._finish(self._report_lost)

    def give_up(self) -> None:
        """Wait for the save in flight and only report its error: another one ends the run."""
        self._finish(self._report)

    def _report(self, step: int, error: CheckpointError) -> None:
        if not isinstance(error.__cause__, RayLost):  # which ends the run, and is told there
            self._on_message(str(error))

    def _finish(self, on_error: Callable[[int, CheckpointError], None]) -> None:
        saved = self._saves.finish(on_error)
        if saved is not None:
            self._complete(saved.round, saved.result())

    def _report_lost(self, step: int, error: CheckpointError) -> None:
        if isinstance(error.__cause__, RayLost):
            raise error.__cause__
        if not isinstance(error.__cause__, ShardLost):
            raise error
        self._on_message(f"no checkpoint of step {step}: {error}")

    def _complete(self, step: int, directory: str) -> None:
        store.prune(
            self._directory,
            self._keep.last,
            directory,
            keep_every=self._keep.every,
            keep_every_s=self._keep.every_s,
        )
        is_local = isinstance(self._directory, LocalDirectory)
        self._on_save(step, Path(directory) if is_local else directory)
