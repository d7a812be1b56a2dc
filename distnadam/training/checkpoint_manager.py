"""The checkpoints of one run of `fit`: written behind the training, told when they are complete,
old ones removed.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.run_lock import RunLock
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.client.checkpointing import SaveHandle
from distnadam.errors import CheckpointError, ShardLost
from distnadam.optimizer import DistNadam


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay, as `fit` has it."""

    last: int
    every: int | None
    every_s: float | None


@dataclass(frozen=True)
class Plan:
    """The steps in all, and those between two saves and two evaluations; whether to resume, and
    what to keep.
    """

    steps: int
    save_every: int | None
    evaluate_every: int | None
    resume: str
    keep: RetentionPolicy

    def boundary_after(self, step: int) -> int:
        """Return the next step at which something is due."""
        due = [
            step + every - step % every
            for every in (self.save_every, self.evaluate_every)
            if every is not None
        ]
        return min([self.steps, *due])

    def due(self, every: int | None, step: int) -> bool:
        """Whether what is done every so many steps, and at the end, is to be done after this
        one.
        """
        return step == self.steps or (every is not None and step % every == 0)


_DATA = frozenset({"task", "seed", "num_workers"})


def data_of_run(where: DirectoryLike) -> dict[str, Any]:
    """Return what `fit` keeps beside the state in the newest checkpoint under a path, so that it
    goes on from one that others write there.

    It is the same for all of a run's checkpoints; what others keep, such as a place in their data,
    may not be, and is not copied.
    """
    for step in reversed(store.step_directories(where)):
        with suppress(CheckpointError):
            data = store.load(step).data
            return dict(data) if data.keys() == _DATA else {}
    return {}


class CheckpointManager:
    """See the module.

    Args:
        claim: on where checkpoints go.
        keep: which of them stay.
        data: what is kept beside the state.
        on_save: told the step and the checkpoint, once it is complete.
        on_message: told what else the user should know.
    """

    def __init__(
        self,
        claim: RunLock,
        keep: RetentionPolicy,
        data: Mapping[str, Any],
        on_save: Callable[[int, Path | str], None],
        on_message: Callable[[str], None],
    ) -> None:
        self._claim, self._folder, self._keep, self._data = claim, claim.directory, keep, data
        self._on_save, self._on_message = on_save, on_message
        self._saving: tuple[int, SaveHandle] | None = None

    def save(self, optimizer: DistNadam, step: int, *, wait: bool) -> None:
        """Save; an earlier one is waited for. Raise CheckpointBusy where another run has taken the
        folder over.
        """
        self.finish()
        self._claim.check()
        saved = optimizer.save(self._folder, wait=wait, data=self._data)
        if isinstance(saved, SaveHandle):
            self._saving = (step, saved)
        else:
            self._complete(step, saved)

    def poll(self) -> None:
        """Tell of the one that is being written where it is complete."""
        if self._saving is not None and self._saving[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the one that is being written; where a shard died meanwhile, do without it."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            directory = saving[1].result()
        except CheckpointError as error:
            if not isinstance(error.__cause__, ShardLost):
                raise
            self._on_message(f"no checkpoint of step {saving[0]}: {error}")
        else:
            self._complete(saving[0], directory)

    def give_up(self) -> None:
        """Wait for the one that is being written while something else, which is told, ends the
        run.
        """
        try:
            self.finish()
        except CheckpointError as error:
            self._on_message(str(error))

    def _complete(self, step: int, directory: str) -> None:
        store.prune(
            self._folder,
            self._keep.last,
            directory,
            keep_every=self._keep.every,
            keep_every_s=self._keep.every_s,
        )
        self._on_save(
            step, Path(directory) if isinstance(self._folder, LocalDirectory) else directory
        )
