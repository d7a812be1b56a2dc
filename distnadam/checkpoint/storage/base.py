"""Where checkpoints lie: a folder of a local disk, or (in `remote`) one under any fsspec URL. What
a checkpoint is, is not known here.

Every refusal by the system is a CheckpointError that names the file. A file that is being written
looks complete to nobody who knows its size; `replace` makes a file appear whole or not at all.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from distnadam.errors import CheckpointError

Pieces = Callable[[], Iterator[memoryview]]
"""A file's contents, from its beginning each time it is asked."""


ReadInto = Callable[[Sequence[memoryview], int], None]
"""Fills buffers, one after another, with a file's bytes from an offset on."""


class Directory(ABC):
    """Files and folders under one name; `str` of it is what users give and get: a plain path where
    local, a URL otherwise.

    `run_bytes` is how much is best read at once.
    """

    run_bytes = 1 << 20

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the path."""

    @abstractmethod
    def child(self, name: str) -> "Directory":
        """Return the folder of that name in this one, there or not."""

    @abstractmethod
    def make(self) -> None:
        """See to it that files can be written here."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Return the sizes of the files here, by name; none where there is no such folder."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the folders here."""

    @abstractmethod
    def read(self, name: str, at_most: int) -> bytes:
        """Return a file's contents; raise CheckpointError where there is none, or it has more bytes
        than that.
        """

    @abstractmethod
    def reading(self, name: str) -> contextlib.AbstractContextManager[ReadInto]:
        """Open a file to be read by any number of threads."""

    @abstractmethod
    def write(self, name: str, pieces: Pieces) -> None:
        """Write a new file and flush it to where it lasts; where that fails, nothing of it is
        left.
        """

    @abstractmethod
    def replace(self, name: str, contents: bytes, *, temporary: str) -> None:
        """Write a file, or replace it, in one atomic step that lasts; `temporary` is a name that
        nobody else uses.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file where it is."""

    @abstractmethod
    def remove_folder(self) -> None:
        """Remove this folder where nothing is in it."""

    @abstractmethod
    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Hold this folder, which must be there, for one writer; raise CheckpointBusy where another
        holds it.
        """


def parent_of(where: object) -> str:
    """Return the name of the folder that a folder lies in."""
    return str(where).rstrip("/").rpartition("/")[0]


@contextlib.contextmanager
def told(path: object, what: str) -> Iterator[None]:
    """Turn what the system refuses into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be {what}: {error.strerror or error}") from error
