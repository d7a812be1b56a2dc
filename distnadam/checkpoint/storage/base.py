"""The interface of a checkpoint directory's storage, which local disks and fsspec URLs implement.

Files are opaque bytes here; what makes a checkpoint of them is in `store`. Every refusal by the
system becomes a CheckpointError that names the file. A file that is being written never looks
complete to a reader that knows its size; `Directory.replace` makes a file appear whole or not at
all.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import override

from distnadam.errors import CheckpointError
from distnadam.places import shown

Pieces = Callable[[], Iterator[memoryview]]
"""Yields a file's contents; each call starts at the beginning, so that a write can be retried."""

ReadInto = Callable[[Sequence[memoryview], int], None]
"""Fills buffers, one after another, with a file's bytes from an offset on."""


class Directory(ABC):
    """A directory of files; its `str` is for people to read, see `places.shown`.

    `best_read_bytes` is the size of one read at which this storage is fastest.
    """

    best_read_bytes = 1 << 20

    @property
    @abstractmethod
    def place(self) -> str:
        """What users pass and receive, and what opens it: a plain path or a URL."""

    @override
    def __str__(self) -> str:
        return shown(self.place)

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the path."""

    @abstractmethod
    def child(self, name: str) -> "Directory":
        """Return the subdirectory of that name, whether it exists or not."""

    @abstractmethod
    def make(self) -> None:
        """Create the directory and its parents unless they exist."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Return the size in bytes of each file, by name; empty if the directory does not exist."""

    @abstractmethod
    def directories(self) -> list[str]:
        """Return the names of the subdirectories; empty if the directory does not exist."""

    @abstractmethod
    def read(self, name: str, at_most: int) -> bytes:
        """Return a file's contents.

        Raises:
            CheckpointError: the file does not exist, or has more than `at_most` bytes.
        """

    @abstractmethod
    def reading(self, name: str) -> contextlib.AbstractContextManager[ReadInto]:
        """Open a file; any number of threads may call the result at once."""

    @abstractmethod
    def write(self, name: str, pieces: Pieces) -> None:
        """Write a new file and flush it to durable storage; leave nothing behind on failure."""

    @abstractmethod
    def replace(self, name: str, contents: bytes, *, temporary: str) -> None:
        """Create or replace a file in one atomic, durable step.

        Args:
            name: the file's.
            contents: the whole file.
            temporary: a name in this directory that no other writer uses.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Remove the directory if it exists and is empty."""

    @abstractmethod
    def hold(self) -> contextlib.AbstractContextManager[bool]:
        """Lock this directory for one who writes or removes it; False if it is not there.

        Raises:
            CheckpointBusy: another holds it.
        """


@contextlib.contextmanager
def os_errors_as(path: object, action: str) -> Iterator[None]:
    """Raise an OSError of the body as a CheckpointError: "<path>: cannot be <action>: <reason>"."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be {action}: {error.strerror or error}") from error
