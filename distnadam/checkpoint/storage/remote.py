"""A folder under an fsspec URL: object stores and the like, where nothing is renamed and a file
appears once all of it has arrived.

What fails for a while is tried again, with growing pauses. There are no locks there: two runs are
kept apart by leases (`claim`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from distnadam.checkpoint.storage.base import Directory, Pieces, ReadInto
from distnadam.errors import CheckpointError

_T = TypeVar("_T")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_PAUSES_S = (0.1, 0.4, 1.6, 3.2)
"""How long to wait before each further try."""
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def remote_folder(url: str) -> "RemoteDirectory":
    """Return the folder of a URL; raise CheckpointError where its protocol is unknown, or what
    speaks it is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        hint = f": pip install 'distnadam[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else ""
        raise CheckpointError(
            f"{url}: nothing here speaks {protocol}://{hint} ({error})"
        ) from error
    return RemoteDirectory(filesystem, protocol, path.rstrip("/"))


class RemoteDirectory(Directory):
    """See the module.

    Args:
        filesystem: fsspec's.
        protocol: of the URL.
        path: as the filesystem has it.
    """

    run_bytes = 8 << 20

    def __init__(self, filesystem: Any, protocol: str, path: str) -> None:
        self._fs, self._protocol, self._path = filesystem, protocol, path

    def __str__(self) -> str:
        return f"{self._protocol}://{self._path.lstrip('/')}"

    @property
    def name(self) -> str:
        """See `Directory.name`."""
        return self._path.rpartition("/")[2]

    def child(self, name: str) -> "RemoteDirectory":
        """See `Directory.child`."""
        return RemoteDirectory(self._fs, self._protocol, f"{self._path}/{name}")

    def make(self) -> None:
        """See `Directory.make`; folders are names there, but a bucket must be had."""
        self._trying("", "made", lambda: self._fs.makedirs(self._path, exist_ok=True))

    def files(self) -> dict[str, int]:
        """See `Directory.files`."""
        return {
            _last(entry): int(entry["size"] or 0)
            for entry in self._list()
            if entry["type"] == "file" and _last(entry)
        }

    def folders(self) -> list[str]:
        """See `Directory.folders`."""
        return [_last(entry) for entry in self._list() if entry["type"] == "directory"]

    def read(self, name: str, at_most: int) -> bytes:
        """See `Directory.read`."""
        contents = self._trying(
            name, "read", lambda: self._fs.cat_file(self._at(name), start=0, end=at_most + 1)
        )
        if len(contents) > at_most:
            raise CheckpointError(f"{self}/{name}: has more than {at_most} bytes")
        return bytes(contents)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[ReadInto]:
        """See `Directory.reading`."""

        def read_into(views: Sequence[memoryview], offset: int) -> None:
            size = sum(map(len, views))
            contents = self._trying(
                name,
                "read",
                lambda: self._fs.cat_file(self._at(name), start=offset, end=offset + size),
            )
            if len(contents) != size:
                raise CheckpointError(
                    f"{self}/{name}: ends at byte {offset + len(contents)}, before it should"
                )
            rest = memoryview(contents)
            for view in views:
                view[:], rest = rest[: len(view)], rest[len(view) :]

        yield read_into

    def write(self, name: str, pieces: Pieces) -> None:
        """See `Directory.write`; an upload that fails is begun anew."""

        def upload() -> None:
            file = self._fs.open(self._at(name), "wb")
            try:
                for piece in pieces():
                    file.write(piece)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    file.discard()
                with contextlib.suppress(AttributeError):
                    file.closed = True  # or the collector would send what there is
                raise
            file.close()

        try:
            self._trying(name, "written", upload)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self.remove(name)
            raise

    def replace(self, name: str, contents: bytes, *, temporary: str) -> None:
        """See `Directory.replace`; what is put there appears whole by itself."""
        self._trying(name, "written", lambda: self._fs.pipe_file(self._at(name), contents))

    def remove(self, name: str) -> None:
        """See `Directory.remove`."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))

        self._trying(name, "removed", remove)

    def remove_folder(self) -> None:
        """See `Directory.remove_folder`."""
        with contextlib.suppress(Exception):  # object stores have none
            if not self._list():
                self._fs.rmdir(self._path)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """See `Directory.hold`; nobody is kept out."""
        yield

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _list(self) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return list(self._fs.ls(self._path, detail=True))
            return []

        return self._trying("", "listed", look)

    def _trying(self, name: str, what: str, work: Callable[[], _T]) -> _T:
        """Do what may be done again, as often as it fails for a reason that may pass."""
        for pause_s in (*_PAUSES_S, None):
            try:
                return work()
            except CheckpointError:
                raise
            except Exception as error:  # every store has its own kinds
                if pause_s is None or isinstance(error, _FINAL):
                    told = f"{type(error).__name__}: {error}".rstrip(": ")
                    raise CheckpointError(
                        f"{self}/{name}".rstrip("/") + f": cannot be {what}: {told}"
                    ) from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")


def _last(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
