"""The checkpoints of a directory: written, committed, found, verified, pruned.

A checkpoint is committed by one atomic replace of its manifest, and found by being valid, never by
a pointer. Paths are local or fsspec URLs. What the files hold is in `manifest` and `shard_file`.
"""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.checkpoint.manifest import SHARD_FILE, FileRecord, Manifest, shard_file_name
from distnadam.checkpoint.shard_file import check_file_record, verify_files
from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.resolve import DirectoryLike, open_directory
from distnadam.errors import CheckpointBusy, CheckpointError

log = logging.getLogger("distnadam")

_T = TypeVar("_T")
MANIFEST = "manifest.msgpack"
_STEP = re.compile(r"step_(\d{8,18})")
_LARGEST_MANIFEST = 64 << 20
_TRIES = 10
"""How often others may remove or replace what is looked at before that is an error."""


def step_directory(root: DirectoryLike, round: int) -> Directory:
    """Return the directory for the checkpoint of a protocol round under `root`.

    Raises:
        CheckpointError: `root` is itself a checkpoint.
    """
    directory = open_directory(root)
    if MANIFEST in directory.files():
        raise CheckpointError(f"{directory}: is a checkpoint; save to the directory that holds it")
    return directory.child(f"step_{round:08d}")


@contextlib.contextmanager
def writing(path: DirectoryLike) -> Iterator[None]:
    """Create one checkpoint's directory and hold it for one save, so that nobody removes it.

    Raises:
        CheckpointBusy: another save writes there.
    """
    directory = open_directory(path)
    for _ in range(_TRIES):
        directory.make()
        with directory.hold() as is_there:
            if is_there:
                yield
                return
    raise CheckpointError(f"{directory}: is removed whenever it is made")


class NewCheckpoint:
    """A checkpoint that is being written: none until `commit`, and then a whole one."""

    def __init__(self, directory: Directory, manifest: Manifest) -> None:
        self.directory = directory
        self.id = CheckpointId(directory.place, manifest.save_id)
        self.round = manifest.round
        self._manifest = manifest

    def file_name(self, index: int, count: int) -> str:
        """Return the name of the file of shard `index` of `count`."""
        return shard_file_name(index, count, self._manifest.save_id)

    def commit(self, files: Iterable[FileRecord]) -> None:
        """Make the written files a checkpoint; raise CheckpointError if one cannot be seen."""
        manifest = dataclasses.replace(self._manifest, files=tuple(files), saved_at=time.time())
        commit(self.directory, manifest)


@contextlib.contextmanager
def new_checkpoint(root: DirectoryLike, manifest: Manifest) -> Iterator[NewCheckpoint]:
    """Hold the directory of the manifest's round under `root`; discard what was written on error.

    Raises:
        CheckpointError: `root` is itself a checkpoint, or that round's is of another run of `fit`.
        CheckpointBusy: another save writes there.
    """
    directory = step_directory(root, manifest.round)
    with writing(directory):
        _check_replaceable(directory, manifest)
        try:
            yield NewCheckpoint(directory, manifest)
        except BaseException:
            discard_partial(directory, manifest.save_id)
            raise


def _check_replaceable(directory: Directory, manifest: Manifest) -> None:
    """Raise CheckpointError if a run of `fit` would lose the checkpoint to one of something else.

    Without it that run could not be resumed.
    """
    if MANIFEST not in directory.files():
        return
    present = dict[str, Any]()
    with contextlib.suppress(CheckpointError):
        present = load(directory).run
    if present and any(present.get(key) != manifest.run.get(key) for key in ("task", "seed")):
        raise CheckpointError(
            f"{directory}: is a checkpoint of a run of fit (task {present.get('task')!r}, seed "
            f"{present.get('seed')!r}), and what is to be saved is not of it; save to another place"
        )


def commit(path: DirectoryLike, manifest: Manifest) -> None:
    """Make the written files of a save a checkpoint, and remove files of earlier saves there.

    The manifest appears whole or not at all.

    Raises:
        CheckpointError: a shard's file cannot be seen from here, or the manifest not be written.
    """
    directory = open_directory(path)
    sizes = directory.files()
    for record in manifest.files:
        if sizes.get(record.name) != record.size:
            raise CheckpointError(
                f"{directory}/{record.name}: a shard wrote it but it is not here: it was removed "
                "since, or is on another disk; save to a disk that every node with a shard shares, "
                "or to a URL (s3://...)"
            )
    directory.replace(MANIFEST, manifest.to_bytes(), temporary=_temporary(manifest.save_id))
    for name in sizes:
        if (match := SHARD_FILE.fullmatch(name)) and match[1] != manifest.save_id:
            with contextlib.suppress(CheckpointError):  # this checkpoint is whole all the same
                directory.remove(name)


def discard_partial(path: DirectoryLike, save_id: str) -> None:
    """Remove the files of a failed save, and the directory if that empties it.

    Nothing is removed of a save whose manifest is there: it failed after its commit. Files that
    cannot be removed are left; they harm no later save.
    """
    directory = open_directory(path)
    with contextlib.suppress(CheckpointError):
        names = directory.files()
        if MANIFEST in names and load(directory).save_id == save_id:
            return
        for name in names:
            match = SHARD_FILE.fullmatch(name)
            if (match and match[1] == save_id) or name == _temporary(save_id):
                directory.remove(name)
    directory.remove_if_empty()


def load(path: DirectoryLike) -> Manifest:
    """Return one checkpoint's manifest.

    Raises:
        CheckpointError: naming the file that is missing or refused.
    """
    directory = open_directory(path)
    contents = directory.read(MANIFEST, _LARGEST_MANIFEST)
    return Manifest.from_bytes(contents, f"{directory}/{MANIFEST}")


def check_files(path: DirectoryLike, manifest: Manifest) -> None:
    """Check a checkpoint's files by name and size, without reading them.

    Hidden files, and files of another save that was killed before its end, are allowed.

    Raises:
        CheckpointError: naming a file that is missing, has another size, or does not belong.
    """
    directory = open_directory(path)
    sizes = directory.files()
    for record in manifest.files:
        check_file_record(directory, record)
        size = sizes.pop(record.name, None)
        if size is None or size < 0:
            raise CheckpointError(f"{directory}/{record.name}: is missing, or no file")
        if size != record.size:
            raise CheckpointError(
                f"{directory}/{record.name}: has {size} bytes, expected {record.size}"
            )
    for name in sizes:
        match = SHARD_FILE.fullmatch(name)
        if (
            name != MANIFEST
            and not name.startswith(".")
            and (match is None or match[1] == manifest.save_id)
        ):
            raise CheckpointError(f"{directory}/{name}: is no file of this checkpoint")


def verify(path: DirectoryLike) -> Manifest:
    """Verify every byte of one checkpoint and return its manifest.

    Raises:
        CheckpointError: naming the file that is refused.
    """
    manifest = load(path)
    check_files(path, manifest)
    verify_files(path, manifest)
    return manifest


def is_single_checkpoint(path: DirectoryLike) -> bool:
    """Return whether a path means one checkpoint: it is named as one, or holds a manifest."""
    directory = open_directory(path)
    return _STEP.fullmatch(directory.name) is not None or MANIFEST in directory.files()


def candidates(path: DirectoryLike, passed_over: list[str]) -> Iterator[tuple[Directory, Manifest]]:
    """Yield the checkpoints that a path can mean, newest first; the caller verifies their bytes.

    The path of one checkpoint means that one. A directory means each checkpoint under it, those
    included that another process saves while the caller looks at one that it removes.

    Args:
        path: one checkpoint, or a directory of them.
        passed_over: receives a sentence for each checkpoint that is refused here; the caller adds
            one for each that it refuses itself, so that the last error names them all.

    Raises:
        CheckpointError: the one checkpoint is refused, or all are.
    """
    directory = open_directory(path)
    if is_single_checkpoint(directory):
        manifest = load(directory)
        check_files(directory, manifest)
        yield directory, manifest
        return
    if not directory.directories() and not directory.files():
        raise CheckpointError(f"{directory}: is no checkpoint and no directory of checkpoints")
    for step in _newest_first(directory):
        for manifest in _manifests(step, passed_over):
            yield step, manifest
    reasons = f": {'; '.join(passed_over)}" if passed_over else ""
    raise CheckpointError(f"{directory}: holds no valid checkpoint{reasons}")


def _manifests(step: Directory, passed_over: list[str]) -> Iterator[Manifest]:
    """Yield one checkpoint's manifest, then that of each save that has replaced it meanwhile."""
    tried = set[str]()
    try:
        while len(tried) < _TRIES and (manifest := load(step)).save_id not in tried:
            tried.add(manifest.save_id)
            try:
                check_files(step, manifest)
            except CheckpointError as error:
                passed_over.append(str(error))
            else:
                yield manifest
    except CheckpointError as error:
        passed_over.append(str(error))


def find(path: DirectoryLike) -> tuple[Directory, Manifest, list[str]]:
    """Return the checkpoint that a path means, and a sentence for each one passed over.

    The path of one checkpoint means that one, and its files are not read here. Under a directory it
    is the newest checkpoint that verifies.

    Raises:
        CheckpointError: the one checkpoint is refused, or none is valid.
    """
    passed_over: list[str] = []
    if is_single_checkpoint(path):
        return open_directory(path), load(path), passed_over
    for directory, manifest in candidates(path, passed_over):
        try:
            verify_files(directory, manifest)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return directory, manifest, passed_over
    raise AssertionError("candidates ends with an error")


def load_first_valid(path: DirectoryLike, load: Callable[[Directory, Manifest], _T]) -> _T:
    """Return what `load` makes of a path's first candidate that it does not refuse.

    A warning names each checkpoint passed over. The path of one checkpoint is strict: that one.

    Raises:
        CheckpointError: the one checkpoint is refused, or all are.
    """
    passed_over: list[str] = []
    strict = is_single_checkpoint(path)
    logged = 0
    for directory, manifest in candidates(path, passed_over):
        for sentence in passed_over[logged:]:
            log.warning("passed over: %s", sentence)
        logged = len(passed_over)
        try:
            return load(directory, manifest)
        except CheckpointError as error:
            if strict:
                raise
            passed_over.append(str(error))
    raise AssertionError("candidates ends with an error")


def step_directories(root: DirectoryLike) -> list[Directory]:
    """Return the directories under `root` that are named as checkpoints, oldest round first."""
    directory = open_directory(root)
    names = filter(_STEP.fullmatch, directory.directories())
    return [directory.child(each) for each in sorted(names, key=lambda n: (_round_of(n), n))]


def _newest_first(root: DirectoryLike) -> Iterator[Directory]:
    """Yield the directories under `root` that are named as checkpoints, newest round first.

    Those that appear meanwhile come before older ones: whoever makes them removes these.
    """
    seen = set[str]()
    for _ in range(len(step_directories(root)) + _TRIES):
        steps = [step for step in step_directories(root) if step.name not in seen]
        if not steps:
            return
        seen.add(steps[-1].name)
        yield steps[-1]


def prune(
    root: DirectoryLike,
    keep: int,
    newest: DirectoryLike,
    *,
    keep_every: int | None = None,
    keep_every_s: float | None = None,
) -> list[Directory]:
    """Delete old checkpoints under `root` and return their directories, newest first.

    Checkpoints are judged without reading their shards' files. An invalid one is never kept for its
    own sake and does not count as one of the last `keep`; checkpoints of later rounds than `newest`
    belong to another history and are left alone, as is one that somebody writes or removes. One
    that cannot be deleted is logged, and tried again by the next call.

    Args:
        root: the directory of checkpoints.
        keep: how many of the last checkpoints stay.
        newest: the checkpoint that was just written.
        keep_every: rounds that are multiples of this stay too.
        keep_every_s: counted from the oldest, one checkpoint in each span of so many seconds stays
            too.
    """
    last = _round_of(open_directory(newest).name)
    steps = [step for step in step_directories(root) if _round_of(step.name) <= last]
    valid = {step.name: manifest for step in steps if (manifest := _valid_manifest(step))}
    kept, kept_at = set(list(valid)[-keep:]), float("-inf")
    for name, manifest in valid.items():
        if keep_every_s is not None and manifest.saved_at - kept_at >= keep_every_s:
            kept.add(name)
            kept_at = manifest.saved_at
        if keep_every is not None and manifest.round % keep_every == 0:
            kept.add(name)
    # an invalid checkpoint may be one being written, unless it is older than all that stay
    oldest_of_last = _round_of(list(valid)[-keep]) if len(valid) >= keep else 0
    deleted = []
    for step in reversed(steps):
        if step.name not in kept and (step.name in valid or _round_of(step.name) < oldest_of_last):
            try:
                with step.hold() as is_there:
                    if is_there:
                        remove(step)
                        deleted.append(step)
            except CheckpointError as error:
                if not isinstance(error, CheckpointBusy):
                    log.warning("an old checkpoint stays: %s", error)
    return deleted


def _valid_manifest(directory: Directory) -> Manifest | None:
    """Return a checkpoint's manifest, or None if it is refused; the shards' files are not read."""
    with contextlib.suppress(CheckpointError):
        manifest = load(directory)
        check_files(directory, manifest)
        return manifest
    return None


def _round_of(step_name: str) -> int:
    return int(step_name.removeprefix("step_"))


def _temporary(save_id: str) -> str:
    return f".{MANIFEST}.{save_id}"


def remove(path: DirectoryLike) -> None:
    """Delete one checkpoint, its manifest first, so that a rest of it never passes for one."""
    directory = open_directory(path)
    directory.remove(MANIFEST)
    for name in directory.files():
        if SHARD_FILE.fullmatch(name) or name.startswith(f".{MANIFEST}."):
            directory.remove(name)
    directory.remove_if_empty()
