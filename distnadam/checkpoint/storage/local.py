"""A directory of this machine's disks, or of one that it mounts."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from distnadam.checkpoint.storage.base import Directory, Pieces, ReadInto, told
from distnadam.checkpoint.storage.direct_io import write_pieces
from distnadam.errors import CheckpointBusy, CheckpointError


class LocalDirectory(Directory):
    """A folder of this machine's disks, or of one that it mounts."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """See `Directory.name`."""
        return self.path.name

    def child(self, name: str) -> "LocalDirectory":
        """See `Directory.child`."""
        return LocalDirectory(self.path / name)

    def make(self) -> None:
        """See `Directory.make`."""
        with told(self.path, "made"):
            os.makedirs(self.path, exist_ok=True)

    def files(self) -> dict[str, int]:
        """See `Directory.files`; what is neither file nor folder, a pipe say, has no size that
        fits: -1.
        """
        found = {}
        with (
            told(self.path, "read"),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self.path) as entries,
        ):
            for entry in entries:
                if not entry.is_dir():
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size if entry.is_file() else -1
        return found

    def folders(self) -> list[str]:
        """See `Directory.folders`."""
        with (
            told(self.path, "read"),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self.path) as entries,
        ):
            return [entry.name for entry in entries if entry.is_dir()]
        return []

    def read(self, name: str, at_most: int) -> bytes:
        """See `Directory.read`."""
        with self.reading(name) as read_into:
            size = os.stat(self.path / name).st_size
            if size > at_most:
                raise CheckpointError(
                    f"{self.path / name}: has {size} bytes, expected at most {at_most}"
                )
            contents = bytearray(size)
            read_into([memoryview(contents)], 0)
        return bytes(contents)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[ReadInto]:
        """See `Directory.reading`; a pipe, which would be waited for, is refused."""
        path = self.path / name
        with told(path, "read"):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

        def read_into(views: Sequence[memoryview], offset: int) -> None:
            wanted = [view for view in views if view]
            while wanted:
                with told(path, "read"):
                    got = os.preadv(descriptor, wanted, offset)
                if got == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset}, before it should")
                offset += got
                while wanted and got >= len(wanted[0]):
                    got -= len(wanted.pop(0))
                if got:
                    wanted[0] = wanted[0][got:]

        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{path}: is missing, or no file")
            yield read_into
        finally:
            os.close(descriptor)

    def write(self, name: str, pieces: Pieces) -> None:
        """See `Directory.write`."""
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:
            told_what = (
                "cannot be written: its folder is not on this node; save to a disk "
                "that every node with a shard shares, or to a URL"
            )
            raise CheckpointError(f"{path}: {told_what}") from error
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror or error}"
            ) from error
        try:
            with told(path, "written"):
                write_pieces(descriptor, pieces())
                os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    def replace(self, name: str, contents: bytes, *, temporary: str) -> None:
        """See `Directory.replace`."""
        with told(self.path, "flushed"):
            _sync(self.path)
        self.write(temporary, lambda: iter([memoryview(contents)]))
        try:
            with told(self.path / name, "written"):
                os.replace(self.path / temporary, self.path / name)
        except CheckpointError:
            self.remove(temporary)
            raise
        with told(self.path, "flushed"):
            _sync(self.path)
            _sync(self.path.parent)

    def remove(self, name: str) -> None:
        """See `Directory.remove`."""
        with told(self.path / name, "removed"), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / name)

    def remove_folder(self) -> None:
        """See `Directory.remove_folder`."""
        with contextlib.suppress(OSError):  # holds something of somebody else's
            os.rmdir(self.path)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """See `Directory.hold`; the hold ends with this process."""
        with told(self.path, "opened"):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointBusy(f"{self.path}: another save is writing it") from error
            yield
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
