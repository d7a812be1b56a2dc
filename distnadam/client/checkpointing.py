"""Saving all shards as one checkpoint of one round: while they are held, or a snapshot that is
written behind the training.

No maths, no Ray. One save of an optimizer is in flight at a time: the next one waits for it.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import FileRecord, Manifest
from distnadam.checkpoint.storage.base import Directory
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import CheckpointError, DistNadamError, Rewound, ShardLost, StepTimeout
from distnadam.metrics.meter import Meter
from distnadam.protocol.messages import Collect, Message, Paused, Reserve, Save

log = logging.getLogger("distnadam")

_IO_TIMEOUT_S = 24 * 3600.0


class SaveHandle:
    """A checkpoint that is being written, or was: what `save(path, wait=False)` returns."""

    def __init__(self) -> None:
        self._future: Future[str] = Future()
        self._told = False

    def done(self) -> bool:
        """Return whether it is complete, or failed."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> str:
        """Wait until the checkpoint is complete, and return its directory.

        Raises:
            CheckpointError: why it is not; earlier checkpoints stay as they were.
            StepTimeout: it was not complete in time; may be called again.
        """
        try:
            directory = self._future.result(timeout_s)
        except TimeoutError as error:
            if not self._future.done():
                raise StepTimeout(f"the checkpoint was not complete in {timeout_s:g} s") from error
            raise
        except BaseException:
            self._told = True
            raise
        return directory

    def surface(self) -> None:
        """Raise the error it ended with, where nobody has been told yet."""
        if self._future.done() and not self._told:
            self.result()

    def complete(self, directory: str) -> None:
        """Say that the checkpoint is complete."""
        self._future.set_result(directory)

    def fail(self, error: BaseException) -> None:
        """Say why there is none."""
        self._future.set_exception(error)


@dataclass(frozen=True)
class _Taken:
    """A snapshot that the shards hold: where it goes, of when it is, and the hold on that
    directory.
    """

    root: str
    directory: Directory
    save_id: str
    names: dict[int, str]
    held: Paused
    generation: int
    hold: ExitStack


class CheckpointWriter:
    """The saves of one handle on an optimizer."""

    def __init__(self) -> None:
        self._newest: SaveHandle | None = None

    def surface(self) -> None:
        """Raise the error of a background save that failed, once."""
        if self._newest is not None:
            self._newest.surface()

    def finish(self) -> None:
        """Wait for the save in flight; raise its error, where nobody has been told yet."""
        saving, self._newest = self._newest, None
        if saving is not None:
            saving._future.exception()
            saving.surface()

    def give_up(self) -> None:
        """Wait for the save in flight; its error is only logged."""
        try:
            self.finish()
        except CheckpointError as error:
            log.warning("a background save failed: %s", error)

    def save(self, shards: ShardGroup, root: Directory, about: Mapping[str, Any]) -> str:
        """Write a checkpoint of one round under `root` while the shards are held, and return its
        directory.
        """
        self.finish()
        with _measured(shards.backend.meter):
            return shards.recovering(lambda: _save(shards, root, about))

    def reserve(self, shards: ShardGroup) -> None:
        """Have every shard get the memory that snapshots are taken into, while rounds go on."""
        shards.recovering(lambda: shards.ask(_everyone(shards, Reserve())))

    def save_async(
        self, shards: ShardGroup, root: Directory, about: Mapping[str, Any]
    ) -> SaveHandle:
        """Have every shard take a snapshot of one round, and write the checkpoint while training
        goes on.
        """
        self.finish()
        with _failures_counted(shards.backend.meter):
            self.reserve(shards)
            taken = shards.recovering(lambda: _snapshot(shards, root))
        saving = self._newest = SaveHandle()
        threading.Thread(
            target=_write_behind, args=(shards, taken, about, saving), name="saving"
        ).start()
        return saving


def _save(shards: ShardGroup, root: Directory, about: Mapping[str, Any]) -> str:
    with shards.boundary() as at, ExitStack() as hold:
        taken = _begin(shards, root, at.held, hold)
        saves = {
            i: Save(token=at.token, directory=str(taken.directory), file_name=name)
            for i, name in taken.names.items()
        }
        try:
            records = shards.ask(saves, timeout_s=_IO_TIMEOUT_S)
            store.commit(taken.directory, _manifest(shards, taken, records, about))
        except BaseException:
            store.discard_partial(taken.directory, taken.save_id)
            raise
        shards.backend.supervisor.checkpoint_saved(taken.root, taken.generation)
        return str(taken.directory)


def _snapshot(shards: ShardGroup, root: Directory) -> _Taken:
    with ExitStack() as hold:
        with shards.boundary() as at:
            taken = _begin(shards, root, at.held, hold)
            saves = {
                i: Save(token=at.token, directory=str(taken.directory), file_name=name, behind=True)
                for i, name in taken.names.items()
            }
            try:
                shards.ask(saves, timeout_s=_IO_TIMEOUT_S)
            except BaseException:
                store.discard_partial(taken.directory, taken.save_id)
                raise
        return replace(taken, hold=hold.pop_all())


def _begin(shards: ShardGroup, root: Directory, held: Paused, hold: ExitStack) -> _Taken:
    """Make and hold the directory of the round at which the shards are held."""
    directory, save_id = store.step_directory(root, held.round), store.new_save_id()
    hold.enter_context(store.writing(directory))
    count = len(shards.ranges)
    names = {i: store.shard_file_name(i, count, save_id) for i in range(count)}
    return _Taken(
        str(root), directory, save_id, names, held, shards.backend.supervisor.generation(), hold
    )


def _write_behind(
    shards: ShardGroup, taken: _Taken, about: Mapping[str, Any], saving: SaveHandle
) -> None:
    try:
        try:
            with _measured(shards.backend.meter):
                _collect(shards, taken, about)
        except BaseException:
            store.discard_partial(taken.directory, taken.save_id)
            raise
        finally:
            taken.hold.close()
    except CheckpointError as error:
        saving.fail(error)
    except ShardLost as error:
        told = (
            f"{taken.directory}: a shard died before its file was written; earlier "
            f"checkpoints stay, save again: {error}"
        )
        saving.fail(_caused(CheckpointError(told), error))
    except DistNadamError as error:
        saving.fail(
            _caused(
                CheckpointError(
                    f"{taken.directory}: could not be written behind the training: {error}"
                ),
                error,
            )
        )
    except BaseException as error:
        log.exception("saving %s", taken.directory)
        saving.fail(error)
    else:
        saving.complete(str(taken.directory))


def _collect(shards: ShardGroup, taken: _Taken, about: Mapping[str, Any]) -> None:
    collects = {i: Collect(name) for i, name in taken.names.items()}
    records = shards.ask(collects, timeout_s=_IO_TIMEOUT_S)
    store.commit(taken.directory, _manifest(shards, taken, records, about))
    shards.backend.supervisor.checkpoint_saved(taken.root, taken.generation)


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


def _caused(error: CheckpointError, cause: BaseException) -> CheckpointError:
    error.__cause__ = cause
    return error


def _everyone(shards: ShardGroup, message: Message) -> dict[int, Message]:
    return dict.fromkeys(range(len(shards.ranges)), message)


def _manifest(
    shards: ShardGroup, taken: _Taken, records: Mapping[int, FileRecord], about: Mapping[str, Any]
) -> Manifest:
    held = taken.held
    return Manifest(
        save_id=taken.save_id,
        layout=shards.layout.to_dict(),
        iterations=held.clock.iterations,
        m_schedule=held.clock.m_schedule,
        round=held.round,
        skipped=held.skipped,
        ledger=held.ledger,
        files=tuple(records[i] for i in sorted(taken.names)),
        saved_at=store.now(),
        **about,
    )
