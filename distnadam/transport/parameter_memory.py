"""The two parameter buffers of a model in one process: written through one mapping, read through
another whose pages cannot be written, not even by a library that ignores NumPy's flags; or, once
they are shared with such a library, both through one.

It knows flat arrays. No shards, no messages.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from weakref import WeakSet

import numpy as np

from distnadam.errors import ArenaError, OutOfMemory
from distnadam.tensors.arrays import Dtypes, Flat, dtypes_of, zeros_flat
from distnadam.transport.shared_memory import (
    POPULATE_READ,
    POPULATE_WRITE,
    arena_bytes,
    flat_in,
    reserve,
    sealed_memfd,
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_MAP_FIXED = 0x10
_POLL_S = 0.001


class ParameterMemory:
    """Both buffers, for shards to write and for workers to read.

    A forked child shares such memory with its parent, where other memory would be a copy. So after
    a fork each of the two moves to memory of its own, at the same addresses, before it may write:

        try:
            memory.inside.add(token)
            if memory.forks != memory.settled:
                memory.settle(token)
            ...  # what may write
        finally:
            memory.inside.discard(token)

    The holder of a token may write one of the buffers, once: not the one that a child forked
    meanwhile goes on from, unless the child refuses to. No function is called unless there was a
    fork: a step waits.

    Args:
        sizes: elements per space.
        dtypes: in which the elements of each space are kept; None for the spaces' own.

    Attributes:
        written: the two buffers, writable.
        read: the same two, in pages that cannot be written until `share`; None where the system has
            no such memory, so that parameters are copied to whoever reads them.
        inside: the tokens of those who may be writing.
        forks: how often this process was forked, or is one that was.
        settled: `forks` when this process last moved.
    """

    def __init__(self, sizes: Mapping[str, int], dtypes: Dtypes | None = None) -> None:
        dtypes = dtypes_of(sizes) if dtypes is None else dtypes
        self.inside: set[object] = set()
        self.forks = 0
        self.settled = 0
        self._lock = Lock()
        self._bytes = max(arena_bytes(sizes, 2, dtypes), mmap.PAGESIZE)
        self.read: tuple[Flat, Flat] | None = None
        try:
            self._writing = self._addresses(mmap.PROT_READ | mmap.PROT_WRITE)
            self._reading = self._addresses(mmap.PROT_READ)
            self._move(copy=False)
        except (OSError, ArenaError):
            self._writing = self._reading = mmap.mmap(-1, mmap.PAGESIZE)
            self.written = (zeros_flat(sizes, dtypes), zeros_flat(sizes, dtypes))
            return
        first, second = (flat_in(self._writing, sizes, copy, dtypes) for copy in (0, 1))
        self.written = first, second
        first, second = (flat_in(self._reading, sizes, copy, dtypes) for copy in (0, 1))
        self.read = first, second
        _memories.add(self)

    def settle(self, token: object) -> None:
        """Move, if no other thread has; the token is inside again then.

        Raises:
            OutOfMemory: there is none for this process's own copy; try again.
        """
        self.inside.discard(token)
        with self._lock:
            while self.settled != self.forks:
                if self.inside:  # they began before the fork
                    time.sleep(_POLL_S)
                    continue
                forks = self.forks
                try:
                    self._move()
                except (OSError, ArenaError) as error:
                    raise OutOfMemory(
                        f"the parameters, of which each process has its own after a fork: {error}"
                    ) from error
                self.settled = forks
            self.inside.add(token)

    def share(self, active: int) -> None:
        """Have whoever reads write too, from now on: in memory that a forked child has a copy of,
        as of all its parent's, so that nothing moves after a fork.

        Nobody may have arrays of `read` yet.

        Args:
            active: the buffer whose contents are kept; the other takes no memory until it is
                written.

        Raises:
            OutOfMemory: there is none.
        """
        _memories.discard(self)
        kept = {space: values.copy() for space, values in self.written[active].items()}
        try:
            _map_at(self._writing, -1, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise OutOfMemory(f"the parameters, where others may write them: {error}") from error
        for space, values in kept.items():
            self.written[active][space][:] = values
        self.read, self._reading = self.written, self._writing
        self.settled = self.forks

    def before_fork(self) -> None:
        """Have this process and the child move before they write."""
        self.forks += 1

    def after_fork(self) -> None:
        """Wait for no thread that only the parent has."""
        self._lock = Lock()
        self.inside = set()

    def _addresses(self, protection: int) -> mmap.mmap:
        """Return addresses for the memory, which `_move` puts there."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return mmap.mmap(-1, self._bytes, flags=flags, prot=protection)

    def _move(self, *, copy: bool = True) -> None:
        """Put new memory at both places, with the same contents or with zeros."""
        fd = sealed_memfd(self._bytes)
        try:
            if copy:
                with mmap.mmap(fd, self._bytes) as new:
                    reserve(new, fd, self._bytes)
                    new[:] = memoryview(self._writing)
            _map_at(self._writing, fd, mmap.PROT_READ | mmap.PROT_WRITE)
            _map_at(self._reading, fd, mmap.PROT_READ)
            if not copy:
                reserve(self._writing, fd, self._bytes)
        finally:
            os.close(fd)
        for place, advice in ((self._writing, POPULATE_WRITE), (self._reading, POPULATE_READ)):
            with suppress(OSError):  # only costs time, at first use
                place.madvise(advice)


def _map_at(place: mmap.mmap, fd: int, protection: int) -> None:
    """Map a file where `place` is, or, where `fd` is -1, memory of this process's own."""
    address = np.frombuffer(place, np.uint8).ctypes.data
    flags = _MAP_FIXED | (mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _libc.mmap(address, len(place), protection, flags, fd, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_memories: WeakSet[ParameterMemory] = WeakSet()


def _before_fork() -> None:
    for memory in list(_memories):
        memory.before_fork()


def _after_fork() -> None:
    for memory in list(_memories):
        memory.after_fork()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
