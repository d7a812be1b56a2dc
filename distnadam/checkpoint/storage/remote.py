"""Checkpoint storage under an fsspec URL: object stores, where a file appears once it is whole.

Nothing is renamed there. Errors that may pass are retried, with growing pauses. There are no locks:
`run_lock` keeps two runs apart by lease files.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from typing_extensions import override

from distnadam.checkpoint.storage.base import Directory, Pieces, ReadInto
from distnadam.errors import CheckpointError
from distnadam.extras import how_to_install
from distnadam.places import below, shown, shown_by_others

_T = TypeVar("_T")
_EXTRA_OF = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
RETRY_PAUSES_S = (0.1, 0.4, 1.6, 3.2)
"""Seconds to wait before each retry."""
_A_NAME = "step_00000000"
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors that no retry helps against."""


def open_remote(url: str) -> "RemoteDirectory":
    """Return the directory of a URL.

    Raises:
        CheckpointError: the protocol is unknown, or the package that implements it is missing.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        hint = f": {how_to_install(_EXTRA_OF[protocol])}" if protocol in _EXTRA_OF else ""
        raise CheckpointError(
            f"{shown(url)}: no installed package handles {protocol}://{hint} ({error})"
        ) from error
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        child = kind._strip_protocol(below(url, _A_NAME))
    except Exception as error:  # every file system has its own: for a host, a port, a password
        reason, cause = _told(error, url)
        raise CheckpointError(f"{shown(url)}: cannot be opened: {reason}") from cause
    path = str(path).rstrip("/")
    if child != f"{path}/{_A_NAME}":
        raise CheckpointError(
            f"{shown(url)}: {protocol}:// takes its ? or # for a part of the path, or leaves it "
            "out: give a URL without"
        )
    return RemoteDirectory(filesystem, url, path)


class RemoteDirectory(Directory):
    """A directory of an fsspec file system.

    Args:
        filesystem: the fsspec file system.
        url: the directory's.
        path: the directory in the file system's own notation.
    """

    best_read_bytes = 8 << 20

    def __init__(self, filesystem: Any, url: str, path: str) -> None:
        self._fs = filesystem
        self._url = url
        self._path = path

    @property
    @override
    def place(self) -> str:
        return self._url

    @property
    @override
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @override
    def child(self, name: str) -> "RemoteDirectory":
        return RemoteDirectory(self._fs, below(self._url, name), f"{self._path}/{name}")

    @override
    def make(self) -> None:
        # directories are only prefixes of names, but the bucket must exist
        self._retrying("", "made", lambda: self._fs.makedirs(self._path, exist_ok=True))

    @override
    def files(self) -> dict[str, int]:
        return {
            _last_part(entry): int(entry["size"] or 0)
            for entry in self._list()
            if entry["type"] == "file" and _last_part(entry)
        }

    @override
    def directories(self) -> list[str]:
        return [_last_part(entry) for entry in self._list() if entry["type"] == "directory"]

    @override
    def read(self, name: str, at_most: int) -> bytes:
        contents = self._retrying(
            name, "read", lambda: self._fs.cat_file(self._at(name), start=0, end=at_most + 1)
        )
        if len(contents) > at_most:
            raise CheckpointError(f"{self}/{name}: has more than {at_most} bytes")
        return bytes(contents)

    @contextlib.contextmanager
    @override
    def reading(self, name: str) -> Iterator[ReadInto]:
        def read_into(views: Sequence[memoryview], offset: int) -> None:
            size = sum(map(len, views))
            contents = self._retrying(
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

    @override
    def write(self, name: str, pieces: Pieces) -> None:
        def upload() -> None:
            file = self._fs.open(self._at(name), "wb")
            try:
                for piece in pieces():
                    file.write(piece)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    file.discard()
                with contextlib.suppress(AttributeError):
                    file.closed = True  # or the garbage collector would upload the part
                raise
            file.close()

        try:
            self._retrying(name, "written", upload)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self.remove(name)
            raise

    @override
    def replace(self, name: str, contents: bytes, *, temporary: str) -> None:
        self._retrying(name, "written", lambda: self._fs.pipe_file(self._at(name), contents))

    @override
    def remove(self, name: str) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))

        self._retrying(name, "removed", remove)

    @override
    def remove_if_empty(self) -> None:
        with contextlib.suppress(Exception):  # object stores have no directories
            if not self._list():
                self._fs.rmdir(self._path)

    @override
    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        yield True  # object stores have no locks: `run_lock` keeps runs apart

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _list(self) -> list[dict[str, Any]]:
        def entries() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return list(self._fs.ls(self._path, detail=True))
            return []

        return self._retrying("", "listed", entries)

    def _retrying(self, name: str, action: str, call: Callable[[], _T]) -> _T:
        """Return what an idempotent call returns, retrying it after errors that may pass.

        Raises:
            CheckpointError: "<file>: cannot be <action>", with the last error.
        """
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                return call()
            except CheckpointError:
                raise
            except Exception as error:  # every store has its own classes
                if pause_s is None or isinstance(error, _PERMANENT):
                    path = f"{self}/{name}".rstrip("/")
                    reason, cause = _told(error, self._url)
                    raise CheckpointError(f"{path}: cannot be {action}: {reason}") from cause
                time.sleep(pause_s)
        raise AssertionError("unreachable")


def _told(error: Exception, url: str) -> tuple[str, Exception | None]:
    """Return a file system's error in words, and itself as the cause of ours, which is printed with
    it; None if it says a secret of the URL.
    """
    said = shown_by_others(str(error), url)
    words = f"{type(error).__name__}: {said}".rstrip(": ")
    return words, error if said == str(error) else None


def _last_part(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
