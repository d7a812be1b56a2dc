"""Saving all shards as one checkpoint of one round, while they are paused or behind the training.

No maths, no Ray, no file format. One save of an optimizer is in flight at a time: the next one
waits for it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from distnadam.checkpoint.manifest import Manifest, Position
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.store import NewCheckpoint, new_checkpoint
from distnadam.client.exit_guard import GUARD
from distnadam.client.shard_group import IO_TIMEOUT_S, ShardGroup
from distnadam.config import Settings
from distnadam.errors import CheckpointError, DistNadamError, Rewound, ShardLost, StepTimeout
from distnadam.metrics.meter import Meter
from distnadam.protocol.messages import Collect, Paused, Reserve, Save
from distnadam.threads import in_background, renew_after_fork
from distnadam.waiting import is_long, said_if_long, say_waiting

log = logging.getLogger("distnadam")


class SaveHandle:
    """A checkpoint that is being written, or was: what `save(path, wait=False)` returns.

    Args:
        round: the round whose state it holds.
        waits_for: returns for whom it waits, in words.
    """

    def __init__(self, round: int, waits_for: Callable[[], str] = lambda: "") -> None:
        self.round = round
        self._waits_for = waits_for
        self._future: Future[str] = Future()
        self._raised = False
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave a save in flight to the parent: this process waits for no end, and raises none."""
        if not self._future.done():
            self._future = Future()
            self._raised = True
            self.fail(CheckpointError("the checkpoint is written by the process that was forked"))

    def done(self) -> bool:
        """Return whether it is complete, or failed."""
        return self._future.done()

    def wait(self) -> bool:
        """Wait until it has ended and return whether it is complete; raise nothing."""
        self._say_if_long(None)
        return self._future.exception() is None

    def result(self, timeout_s: float | None = None) -> str:
        """Wait until the checkpoint is complete, and return its directory.

        Raises:
            CheckpointError: why it is not; earlier checkpoints stay as they were.
            StepTimeout: it was not complete in time; may be called again.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._say_if_long(timeout_s)
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return self._future.result(left_s)
        except TimeoutError as error:
            if not self._future.done():
                raise StepTimeout(f"the checkpoint was not complete in {timeout_s:g} s") from error
            raise
        except BaseException:
            self._raised = True
            raise

    def _say_if_long(self, timeout_s: float | None) -> None:
        """Wait for a while; say once for whom if it lasts, in this thread: others may have ended
        with the interpreter.
        """
        if is_long(self._future, timeout_s):
            try:
                whom = self._waits_for()
            except DistNadamError as error:  # why the save will end, too
                whom = f"since {error}"
            say_waiting(f"checkpoint of round {self.round}", whom, timeout_s)

    def surface(self) -> None:
        """Raise the error that it ended with, unless a call raised it before."""
        if self._future.done() and not self._raised:
            self.result()

    @property
    def unseen(self) -> BaseException | None:
        """The error that it ended with, unless a call raised it; None while it is being written."""
        return self._future.exception() if self._future.done() and not self._raised else None

    def complete(self, directory: str) -> None:
        """Mark the checkpoint complete."""
        self._future.set_result(directory)

    def fail(self, error: BaseException) -> None:
        """Mark the checkpoint failed, and why."""
        self._future.set_exception(error)


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """What the shards hold a copy of: where it goes, and what ends when it is there or has failed.

    `taken` is the supervisor's number of it.
    """

    checkpoint: NewCheckpoint
    names: dict[int, str]
    taken: int
    hold: ExitStack


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint says beside the state: the optimizer's settings and the user's data, as
    `packed_data` returned it.
    """

    settings: Settings
    data: Mapping[str, Any]


class CheckpointWriter:
    """The saves of one handle on an optimizer, and the only record of the one in flight."""

    def __init__(self) -> None:
        self._in_flight: SaveHandle | None = None

    @property
    def is_complete(self) -> bool:
        """Whether `finish` would return or raise something, and at once."""
        return self._in_flight is not None and self._in_flight.done()

    def surface(self) -> None:
        """Raise the error of a background save that failed, once."""
        if self._in_flight is not None:
            self._in_flight.surface()

    def finish(
        self, on_error: Callable[[int, CheckpointError], None] | None = None
    ) -> SaveHandle | None:
        """Wait for the save in flight and return it if it is complete, else None.

        Args:
            on_error: gets the round and the error of a save that failed; None raises the error.
                Either way only if no call has raised it.
        """
        saving = self._in_flight
        complete = saving is None or saving.wait()
        self._in_flight = None  # not before: a Ctrl-C while waiting must not lose the save
        if saving is None or complete:
            return saving
        try:
            saving.surface()
        except CheckpointError as error:
            if on_error is None:
                raise
            on_error(saving.round, error)
        return None

    def give_up(self) -> None:
        """Wait for the save in flight; only log its error."""
        self.finish(lambda _, error: log.warning("a background save failed: %s", error))

    def save(self, shards: ShardGroup, root: Directory, saved: Saved) -> str:
        """Write a checkpoint of one round while the shards are paused; return its directory."""
        self.finish()
        with _measured(shards.backend.meter), _said_if_long(shards, root):
            return shards.recovering(lambda: _save(shards, root, saved))

    def reserve(self, shards: ShardGroup) -> None:
        """Have every shard allocate the memory for snapshots, while rounds go on."""
        shards.recovering(lambda: shards.ask(shards.for_all(Reserve())))

    def save_async(self, shards: ShardGroup, root: Directory, saved: Saved) -> SaveHandle:
        """Have every shard copy the state of one round, and write the checkpoint in a thread."""
        self.finish()
        with shards.backend.shield:
            return self._save_async(shards, root, saved)

    def _save_async(self, shards: ShardGroup, root: Directory, saved: Saved) -> SaveHandle:
        with _failures_counted(shards.backend.meter), _said_if_long(shards, root):
            snapshot = shards.recovering(lambda: _snapshot(shards, root, saved))
        collects = {index: Collect(name) for index, name in snapshot.names.items()}
        saving = SaveHandle(snapshot.checkpoint.round, lambda: shards.reports.unanswered(collects))
        self._in_flight = saving
        GUARD.watch(saving)
        in_background("saving", lambda: _write_behind(shards, snapshot, saving))
        return saving


def _said_if_long(shards: ShardGroup, root: Directory) -> AbstractContextManager[None]:
    """Say what keeps a caller of `save` waiting, if it takes long."""
    return said_if_long(f"save to {root}", shards.reports.busy)


def _save(shards: ShardGroup, root: Directory, saved: Saved) -> str:
    with shards.boundary() as at:
        taken = shards.backend.supervisor.snapshot_taken()
        with new_checkpoint(root, _manifest(shards, at.held, saved)) as checkpoint:
            saves = _saves(shards, checkpoint, at.token, behind=False)
            records = shards.ask(saves, timeout_s=IO_TIMEOUT_S)
            _commit(shards, checkpoint, taken, records)
        return checkpoint.directory.place


def _snapshot(shards: ShardGroup, root: Directory, saved: Saved) -> _Snapshot:
    with ExitStack() as hold:
        with shards.boundary() as at:
            taken = shards.backend.supervisor.snapshot_taken()
            manifest = _manifest(shards, at.held, saved)
            checkpoint = hold.enter_context(new_checkpoint(root, manifest))
            saves = _saves(shards, checkpoint, at.token, behind=True)
            shards.ask(saves, timeout_s=IO_TIMEOUT_S)
        return _Snapshot(
            checkpoint=checkpoint,
            names={i: save.file_name for i, save in saves.items()},
            taken=taken,
            hold=hold.pop_all(),
        )


def _manifest(shards: ShardGroup, held: Paused, saved: Saved) -> Manifest:
    """Return the manifest of the paused round, with its own hyper-parameters."""
    position = Position(
        clock=held.clock,
        round=held.round,
        skipped=held.skipped,
        ledger=held.ledger,
        loss_scale=held.loss_scale,
    )
    return Manifest.of(saved.settings.with_config(held.config), shards.layout, position, saved.data)


def _saves(
    shards: ShardGroup, checkpoint: NewCheckpoint, token: str, *, behind: bool
) -> dict[int, Save]:
    count, directory = len(shards.ranges), checkpoint.directory.place
    return {
        i: Save(
            token=token,
            directory=directory,
            file_name=checkpoint.file_name(i, count),
            behind=behind,
        )
        for i in range(count)
    }


def _write_behind(shards: ShardGroup, snapshot: _Snapshot, saving: SaveHandle) -> None:
    directory = snapshot.checkpoint.directory
    try:
        with _measured(shards.backend.meter), snapshot.hold:
            collects = {i: Collect(name) for i, name in snapshot.names.items()}
            records = shards.ask(collects, timeout_s=IO_TIMEOUT_S)
            _commit(shards, snapshot.checkpoint, snapshot.taken, records)
    except CheckpointError as error:
        saving.fail(error)
    except ShardLost as error:
        message = (
            f"{directory}: a shard died before its file was written; earlier checkpoints stay, "
            f"save again: {error}"
        )
        saving.fail(_caused(message, error))
    except DistNadamError as error:
        message = f"{directory}: could not be written behind the training: {error}"
        saving.fail(_caused(message, error))
    except BaseException as error:
        log.exception("saving %s", directory)
        saving.fail(error)
    else:
        saving.complete(directory.place)


def _commit(
    shards: ShardGroup, checkpoint: NewCheckpoint, taken: int, records: Mapping[int, Any]
) -> None:
    """Commit the written files; tell the supervisor before and after, whoever dies in between."""
    written, supervisor = checkpoint.id, shards.backend.supervisor
    supervisor.checkpoint_written(written, taken, is_whole=False)
    checkpoint.commit(records[index] for index in sorted(records))
    supervisor.checkpoint_written(written, taken, is_whole=True)


@contextmanager
def _failures_counted(meter: Meter | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if meter is not None and not isinstance(error, Rewound):
            meter.save_failures += 1
        raise


@contextmanager
def _measured(meter: Meter | None) -> Iterator[None]:
    """Count the seconds of a save, or that it failed."""
    began = time.monotonic()
    with _failures_counted(meter):
        yield
    if meter is not None:
        meter.save.add(time.monotonic() - began)


def _caused(message: str, cause: BaseException) -> CheckpointError:
    error = CheckpointError(message)
    error.__cause__ = cause
    return error
