"""Flat storage in memory that several processes of one machine map: a sealed memfd, handed from one
to the other over a socket.

Such memory has no name: nothing of it is left in the file system, it is gone with the last process
that maps it, and the size of /dev/shm does not limit it. It is reserved when it is made, and sealed
so that no holder can shrink it under another's feet.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.errors import ArenaError
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges

_PAGE = mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_POPULATE_READ, _POPULATE_WRITE = (
    22,
    23,
)  # MADV_*, Linux 5.14; the mmap module does not name them yet


class Arena:
    """`copies` flats of `sizes[space]` elements per space, each space beginning on a page of its
    own.

    Args:
        fd: the memfd; the arena owns it.
        sizes: elements per space.
        copies: how many flats lie one after the other.
        writable: whether this process may write.
    """

    def __init__(self, fd: int, sizes: Mapping[str, int], copies: int, *, writable: bool) -> None:
        self.fd, self._sizes, self._copies, self._writable = fd, dict(sizes), copies, writable
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(
            fd, max(arena_bytes(sizes, copies), _PAGE), flags=mmap.MAP_SHARED, prot=access
        )
        with suppress(OSError):
            self._map.madvise(
                mmap.MADV_HUGEPAGE
            )  # taken where the system allows them for shared memory; see `doctor`
        self.flats = tuple(self.flat(copy) for copy in range(copies))

    @classmethod
    def create(cls, sizes: Mapping[str, int], copies: int = 1) -> "Arena":
        """Reserve new zeroed memory; raise ArenaError, with nothing kept, where the machine has not
        enough.
        """
        size = max(arena_bytes(sizes, copies), _PAGE)
        available = available_bytes()
        if size > available:
            raise ArenaError(
                f"needs {_mib(size)} of shared memory, {_mib(available)} are available to this "
                "process"
            )
        fd = os.memfd_create("distnadam", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            arena = cls(fd, sizes, copies, writable=True)
            arena._reserve(size)
            return arena
        except OSError as error:
            raise ArenaError(f"{_mib(size)} of shared memory cannot be had: {error}") from error

    @classmethod
    def attach(
        cls, fd: int, sizes: Mapping[str, int], copies: int = 1, *, writable: bool = False
    ) -> "Arena":
        """Map memory that another process made; raise ArenaError where it is not of this size, or
        not sealed.
        """
        size = max(arena_bytes(sizes, copies), _PAGE)
        try:
            if (
                os.fstat(fd).st_size != size
                or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS
            ):
                raise ArenaError(
                    f"expected {size} bytes of sealed shared memory, got {os.fstat(fd).st_size}"
                )
            return cls(fd, sizes, copies, writable=writable)
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"shared memory cannot be mapped: {error}") from error
        except ArenaError:
            os.close(fd)
            raise

    def flat(self, copy: int = 0, dtypes: Mapping[str, np.dtype[Any]] | None = None) -> Flat:
        """Return one copy's arrays; `dtypes` reads a space's memory in another dtype of at most its
        size, from its beginning.
        """
        arrays, offset = {}, copy * arena_bytes(self._sizes, 1)
        for space, n in self._sizes.items():
            dtype = np.dtype(space) if dtypes is None else dtypes.get(space, np.dtype(space))
            arrays[space] = np.frombuffer(self._map, dtype, n, offset)
            offset += _space_bytes(space, n)
        return arrays

    def populate(self, ranges: Ranges) -> None:
        """Map the pages of some ranges now rather than at their first use; only a matter of time,
        so failures do not count.
        """
        advice = _POPULATE_WRITE if self._writable else _POPULATE_READ
        for copy in range(self._copies):
            offset = copy * arena_bytes(self._sizes, 1)
            for space, n in self._sizes.items():
                begin, end = (offset + bound * np.dtype(space).itemsize for bound in ranges[space])
                begin -= begin % _PAGE
                if end > begin:
                    with suppress(OSError, ValueError):
                        self._map.madvise(advice, begin, end - begin)
                offset += _space_bytes(space, n)

    def _reserve(self, size: int) -> None:
        """Have every page now, so that a lack of memory is an error here and no signal later."""
        try:
            self._map.madvise(_POPULATE_WRITE)  # through the mapping, which may have huge pages
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.posix_fallocate(self.fd, 0, size)  # before Linux 5.14

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self.fd)


def arena_bytes(sizes: Mapping[str, int], copies: int = 1) -> int:
    """Return the bytes that an arena takes."""
    return copies * sum(_space_bytes(space, n) for space, n in sizes.items())


def available_bytes() -> int:
    """Return the memory that this process could still get: the machine's, and its control group's
    where that is less.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        with suppress(OSError, ValueError):  # no such version, or "max"
            return [max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))]
    return []


def _space_bytes(space: str, n: int) -> int:
    return -(-n * np.dtype(space).itemsize // _PAGE) * _PAGE


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
