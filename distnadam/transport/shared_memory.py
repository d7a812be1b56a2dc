"""Flat arrays in memory that several processes of one machine map: sealed memfds, handed over a
socket.

Such memory has no name: nothing of it is left in the file system, it is freed with the last process
that maps it, and the size of /dev/shm does not limit it. It is reserved when it is created, so that
a lack of memory is an error and no signal, and sealed so that no holder can shrink it.
"""

import errno
import fcntl
import mmap
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from distnadam.errors import ArenaError
from distnadam.tensors.arrays import Dtypes, Flat, dtypes_of
from distnadam.tensors.layout import Ranges
from distnadam.transport.available_memory import available_bytes

_PAGE = mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ADVISED_BYTES = 64 * 2**20
"""Bytes on which the system is given advice at a time."""
# MADV_* of Linux 5.14, which the mmap module does not name yet
POPULATE_READ = 22
POPULATE_WRITE = 23


class Arena:
    """`copies` flats of `sizes[space]` elements per space, each space on pages of its own.

    Args:
        fd: the memfd, which the arena owns.
        sizes: elements per space.
        copies: the number of flats, one after the other.
        writable: whether this process may write.
        dtypes: in which the elements of each space are kept; None for the spaces' own.
    """

    def __init__(
        self,
        fd: int,
        sizes: Mapping[str, int],
        copies: int,
        *,
        writable: bool,
        dtypes: Dtypes | None = None,
    ) -> None:
        self.fd = fd
        self._sizes = dict(sizes)
        self._copies = copies
        self._writable = writable
        self._dtypes = dtypes_of(sizes) if dtypes is None else dtypes
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        size = max(arena_bytes(sizes, copies, dtypes), _PAGE)
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=access)
        with suppress(OSError):  # if the system allows huge shared pages; see `doctor`
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.flats = tuple(self.flat(copy) for copy in range(copies))

    @classmethod
    def create(
        cls, sizes: Mapping[str, int], copies: int = 1, dtypes: Dtypes | None = None
    ) -> "Arena":
        """Reserve new zeroed memory.

        Raises:
            ArenaError: the machine has not enough; nothing stays reserved.
        """
        size = max(arena_bytes(sizes, copies, dtypes), _PAGE)
        fd = sealed_memfd(size)
        try:
            # owns it, even if not made to its end
            arena = cls(fd, sizes, copies, writable=True, dtypes=dtypes)
            reserve(arena._map, fd, size)
            return arena
        except (OSError, MemoryError) as error:
            raise ArenaError(f"{_mib(size)} of shared memory are not available: {error}") from error

    @classmethod
    def attach(
        cls,
        fd: int,
        sizes: Mapping[str, int],
        copies: int = 1,
        *,
        writable: bool = False,
        dtypes: Dtypes | None = None,
    ) -> "Arena":
        """Map memory that another process created; takes `fd` over in any case.

        Raises:
            ArenaError: it has another size, is not sealed, or cannot be mapped.
        """
        size = max(arena_bytes(sizes, copies, dtypes), _PAGE)
        try:
            if (
                os.fstat(fd).st_size != size
                or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS
            ):
                raise ArenaError(
                    f"expected {size} bytes of sealed shared memory, got {os.fstat(fd).st_size}"
                )
            return cls(fd, sizes, copies, writable=writable, dtypes=dtypes)
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"shared memory cannot be mapped: {error}") from error
        except ArenaError:
            os.close(fd)
            raise

    def flat(self, copy: int = 0, dtypes: Dtypes | None = None) -> Flat:
        """Return one copy's arrays.

        Args:
            copy: which of the copies.
            dtypes: by space, another dtype to read its memory in, from the beginning; no wider than
                the one that it is kept in.
        """
        return flat_in(self._map, self._sizes, copy, self._dtypes, dtypes)

    def populate(self, ranges: Ranges) -> None:
        """Map the pages of these ranges now, not at first use; failures only cost time."""
        advice = POPULATE_WRITE if self._writable else POPULATE_READ
        for copy in range(self._copies):
            offset = copy * arena_bytes(self._sizes, 1, self._dtypes)
            for space, n in self._sizes.items():
                dtype = self._dtypes[space]
                begin, end = (offset + bound * dtype.itemsize for bound in ranges[space])
                begin -= begin % _PAGE
                if end > begin:
                    with suppress(OSError, ValueError):
                        _advise(self._map, advice, begin, end)
                offset += _space_bytes(dtype, n)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self.fd)


def _advise(memory: mmap.mmap, advice: int, begin: int, end: int) -> None:
    """Give advice on bytes [begin, end), a part at a time: meanwhile no other thread runs."""
    for low in range(begin, end, _ADVISED_BYTES):
        memory.madvise(advice, low, min(_ADVISED_BYTES, end - low))


def sealed_memfd(size: int) -> int:
    """Return a descriptor of new memory that no holder can shrink; nothing is reserved yet.

    Raises:
        ArenaError: the machine has not enough, or no such memory.
    """
    available = available_bytes()
    if size > available:
        raise ArenaError(
            f"needs {_mib(size)} of shared memory, {_mib(available)} are available to this process"
        )
    try:
        fd = os.memfd_create("distnadam", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:  # no descriptors, or no such call here
        raise ArenaError(f"shared memory cannot be made here: {error}") from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise ArenaError(f"{_mib(size)} of shared memory are not available: {error}") from error
    return fd


def reserve(memory: mmap.mmap, fd: int, size: int) -> None:
    """Allocate every page of a mapped memfd, so that a lack of memory is an error here, not a
    signal later.
    """
    try:
        # through the mapping, which may have huge pages
        _advise(memory, POPULATE_WRITE, 0, len(memory))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        os.posix_fallocate(fd, 0, size)  # before Linux 5.14


def flat_in(
    memory: mmap.mmap,
    sizes: Mapping[str, int],
    copy: int,
    kept: Dtypes,
    read: Dtypes | None = None,
) -> Flat:
    """Return the arrays of one of several flats that lie in `memory` one after the other.

    Args:
        memory: the flats'.
        sizes: elements per space.
        copy: which of the flats.
        kept: the dtype in which each space is kept.
        read: as `Arena.flat`'s `dtypes`.
    """
    arrays, offset = {}, copy * arena_bytes(sizes, 1, kept)
    for space, n in sizes.items():
        arrays[space] = np.frombuffer(memory, (read or {}).get(space, kept[space]), n, offset)
        offset += _space_bytes(kept[space], n)
    return arrays


def arena_bytes(sizes: Mapping[str, int], copies: int = 1, dtypes: Dtypes | None = None) -> int:
    """Return the bytes that an arena of these sizes takes, in the spaces' own dtypes or others."""
    kept = dtypes_of(sizes) if dtypes is None else dtypes
    return copies * sum(_space_bytes(kept[space], n) for space, n in sizes.items())


def _space_bytes(dtype: np.dtype[Any], n: int) -> int:
    return -(-n * dtype.itemsize // _PAGE) * _PAGE


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def why_not_shared() -> str | None:
    """Return why processes of this host cannot share memory through a socket, or None if they can.

    Tries sealed memory and an abstract Unix socket.
    """
    try:
        Arena.create({"float32": 1})
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"\0distnadam-{secrets.token_hex(8)}")
    except (ArenaError, OSError, AttributeError) as error:
        return str(error)
    return None
