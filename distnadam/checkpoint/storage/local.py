"""Checkpoint storage in a directory that this machine's file system holds, local or mounted.

A file is durable once it and the directory above it are flushed; a manifest appears by one rename.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from typing_extensions import override

from distnadam.checkpoint.storage.base import Directory, Pieces, ReadInto, os_errors_as
from distnadam.checkpoint.storage.direct_io import write_pieces
from distnadam.errors import CheckpointBusy, CheckpointError


class LocalDirectory(Directory):
    """A directory of this machine's file system.

    Args:
        path: absolute, or relative to the working directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))

    @property
    @override
    def place(self) -> str:
        return str(self.path)

    @override
    def __str__(self) -> str:
        return self.place  # a path has no password, whatever it looks like

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    @override
    def name(self) -> str:
        return self.path.name

    @override
    def child(self, name: str) -> "LocalDirectory":
        return LocalDirectory(self.path / name)

    @override
    def make(self) -> None:
        with os_errors_as(self.path, "made"):
            os.makedirs(self.path, exist_ok=True)

    @override
    def files(self) -> dict[str, int]:
        found = {}
        with (
            os_errors_as(self.path, "read"),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self.path) as entries,
        ):
            for entry in entries:
                if not entry.is_dir():
                    with contextlib.suppress(FileNotFoundError):
                        # a pipe, a socket or a device is listed, with a size that no file has
                        found[entry.name] = entry.stat().st_size if entry.is_file() else -1
        return found

    @override
    def directories(self) -> list[str]:
        with (
            os_errors_as(self.path, "read"),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self.path) as entries,
        ):
            return [entry.name for entry in entries if entry.is_dir()]
        return []

    @override
    def read(self, name: str, at_most: int) -> bytes:
        with self.reading(name) as read_into:
            size = os.stat(self.path / name).st_size
            if size > at_most:
                raise CheckpointError(
                    f"{self.path / name}: has {size} bytes, expected at most {at_most}"
                )
            contents = bytearray(size)
            read_into([memoryview(contents)], 0)
        return bytes(contents)

    @override
    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[ReadInto]:
        path = self.path / name
        with os_errors_as(path, "read"):
            # opening a pipe without O_NONBLOCK would wait for a writer
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

        def read_into(views: Sequence[memoryview], offset: int) -> None:
            unfilled = [view for view in views if view]
            while unfilled:
                with os_errors_as(path, "read"):
                    got = os.preadv(descriptor, unfilled, offset)
                if got == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset}, before it should")
                offset += got
                while unfilled and got >= len(unfilled[0]):
                    got -= len(unfilled.pop(0))
                if got:
                    unfilled[0] = unfilled[0][got:]

        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{path}: is missing, or no file")
            yield read_into
        finally:
            os.close(descriptor)

    @override
    def write(self, name: str, pieces: Pieces) -> None:
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path}: cannot be written: its directory is not on this node, or was removed "
                "since; save to a disk that every node with a shard shares, or to a URL"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror or error}"
            ) from error
        try:
            with os_errors_as(path, "written"):
                write_pieces(descriptor, pieces())
                os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    @override
    def replace(self, name: str, contents: bytes, *, temporary: str) -> None:
        with os_errors_as(self.path, "flushed"):
            _sync(self.path)
        self.write(temporary, lambda: iter([memoryview(contents)]))
        try:
            with os_errors_as(self.path / name, "written"):
                os.replace(self.path / temporary, self.path / name)
        except CheckpointError:
            with contextlib.suppress(CheckpointError):  # the first error is the one to report
                self.remove(temporary)
            raise
        with os_errors_as(self.path, "flushed"):
            _sync(self.path)
            _sync(self.path.parent)

    @override
    def remove(self, name: str) -> None:
        with os_errors_as(self.path / name, "removed"), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / name)

    @override
    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):  # holds files that are not ours
            os.rmdir(self.path)

    @override
    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        descriptor = None
        with os_errors_as(self.path, "opened"), contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if descriptor is None:
            yield False
            return
        try:
            if not lock(descriptor, self.path):
                raise CheckpointBusy(f"{self.path}: another save is writing it, or removes it")
            yield is_open_at(self.path, descriptor)  # who held it before may have removed it
        finally:
            os.close(descriptor)


def lock(descriptor: int, path: Path) -> bool:
    """Lock an open file of `path` until it is closed; return False if another process holds it."""
    with os_errors_as(path, "locked"):  # not every file system has locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_open_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one at a path, and was neither removed nor moved."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
