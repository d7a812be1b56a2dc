"""Checkpoints in a directory: committed by one atomic replace, found by what is valid, never by a pointer. Local paths only."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from distnadam.checkpoint.format import verify_files
from distnadam.checkpoint.manifest import Manifest
from distnadam.errors import CheckpointBusy, CheckpointError

MANIFEST = "manifest.msgpack"
_STEP = re.compile(r"step_(\d{8,})")
_LARGEST_MANIFEST = 1 << 30


def new_save_id() -> str:
    """Return a name no other save has."""
    return os.urandom(8).hex()


def step_directory(root: Path, decided: int) -> Path:
    """Return where the checkpoint of a round lies; raise CheckpointError where `root` is itself a checkpoint."""
    if (root / MANIFEST).exists():
        raise CheckpointError(f"{root}: is a checkpoint; save to the directory that holds it")
    return root / f"step_{decided:08d}"


def shard_file_name(index: int, count: int, save_id: str) -> str:
    """Return the name of one shard's file."""
    return f"shard-{index:05d}-of-{count:05d}-{save_id}.safetensors"


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Make one checkpoint's directory and hold it for one save; raise CheckpointBusy where another save writes there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be made: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointBusy(f"{directory}: another save is writing it") from error
        yield
    finally:
        os.close(descriptor)


def commit(directory: Path, manifest: Manifest) -> None:
    """Make written files a checkpoint: the manifest appears whole or not at all; then files of earlier saves there are removed.

    Raises:
        CheckpointError: a shard's file is not to be seen from here, or the manifest cannot be written.
    """
    for record in manifest.files:
        path = directory / record.name
        if not path.is_file() or path.stat().st_size != record.size:
            raise CheckpointError(f"{path}: a shard wrote it but it is not here; save to a disk that every node with a shard shares")
    temporary = directory / f".{MANIFEST}.{manifest.save_id}"
    try:
        _sync_directory(directory)
        with open(temporary, "xb") as file:
            file.write(manifest.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / MANIFEST)
        _sync_directory(directory)
        _sync_directory(directory.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{directory / MANIFEST}: cannot be written: {error.strerror or error}") from error
    for path in directory.glob("shard-*.safetensors"):
        if manifest.save_id not in path.name:
            path.unlink(missing_ok=True)


def discard_partial(directory: Path, save_id: str) -> None:
    """Remove what a failed save left, and the directory where that empties it."""
    for path in (*directory.glob(f"shard-*-{save_id}.safetensors"), directory / f".{MANIFEST}.{save_id}"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: an earlier save of the same round lives there
        directory.rmdir()


def load(directory: Path) -> Manifest:
    """Return one checkpoint's manifest; raise CheckpointError naming the file where there is none, or it is refused."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, a manifest has at most {_LARGEST_MANIFEST}")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return Manifest.from_bytes(raw, str(path))


def verify(directory: Path) -> Manifest:
    """Return one checkpoint's manifest after verifying every byte of it; raise CheckpointError naming the file that is refused."""
    manifest = load(directory)
    verify_files(directory, manifest)
    return manifest


def find(path: Path) -> tuple[Path, Manifest, list[str]]:
    """Return the checkpoint meant by a path, and what was passed over.

    A path that holds a manifest, or is named as one checkpoint is, means that one: its bytes are verified by who reads them. Otherwise the
    newest checkpoint under it that verifies; each newer one that does not gets a sentence.

    Raises:
        CheckpointError: the one is refused, or there is none that is valid.
    """
    if (path / MANIFEST).exists() or _STEP.fullmatch(path.name):
        return path, load(path), []
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no checkpoint and no directory of checkpoints")
    passed_over: list[str] = []
    for directory in reversed(steps(path)):
        try:
            return directory, verify(directory), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    reasons = f": {'; '.join(passed_over)}" if passed_over else ""
    raise CheckpointError(f"{path}: holds no valid checkpoint{reasons}")


def steps(root: Path) -> list[Path]:
    """Return the directories under `root` that are named as checkpoints, oldest round first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def prune(root: Path, keep: int, newest: Path) -> list[Path]:
    """Delete all but `keep` checkpoints of those up to `newest`, which was just written, and return what was deleted.

    One that is not valid does not count as kept; what lies after `newest` is of another history and is left alone.
    """
    kept, deleted = 0, []
    upto = [directory for directory in reversed(steps(root)) if _round(directory) <= _round(newest)]
    for directory in upto:
        if kept >= keep:
            remove(directory)
            deleted.append(directory)
            continue
        with contextlib.suppress(CheckpointError):
            load(directory)
            kept += 1
    return deleted


def _round(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))


def remove(directory: Path) -> None:
    """Delete one checkpoint, its manifest first, so that what is left of it is never taken for one."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in (*directory.glob("shard-*.safetensors"), *directory.glob(f".{MANIFEST}.*")):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # holds something of somebody else's
        directory.rmdir()


class DirectoryLock:
    """Holds a directory of checkpoints for one run, as long as this process lives and has not let go."""

    def __init__(self, root: Path) -> None:
        self._path = root / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self._path.parent}: cannot be made or written: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CheckpointBusy(f"{self._path.parent}: another run writes here (process {holder}); choose another directory") from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return self

    def __exit__(self, *exc: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
