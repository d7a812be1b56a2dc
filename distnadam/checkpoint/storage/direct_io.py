"""Writes a file with O_DIRECT, bypassing the page cache, if its filesystem supports that.

A checkpoint is not read soon, and a page cache that must first find free pages, and later flush
them, slows saving by an unpredictable factor. O_DIRECT needs aligned memory, while a shard's range
begins anywhere: so the state is copied to one aligned buffer while another is being written.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial

from distnadam.threads import in_background

_BUFFER_BYTES = 4 << 20
_ALIGNMENT = 4096


def write_pieces(descriptor: int, pieces: Iterable[memoryview]) -> None:
    """Write pieces one after another to a new, empty file; raise OSError if the system refuses."""
    file = _DirectFile(descriptor)
    filled = 0
    buffer, other = (memoryview(mmap.mmap(-1, _BUFFER_BYTES)) for _ in range(2))
    pending: Future[None] | None = None
    try:
        for piece in pieces:
            while piece:
                part, piece = piece[: _BUFFER_BYTES - filled], piece[_BUFFER_BYTES - filled :]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if filled == _BUFFER_BYTES:
                    if pending is not None:
                        pending.result()
                    pending = in_background("disk", partial(file.write, buffer))
                    buffer, other = other, buffer
                    filled = 0
    finally:
        if pending is not None:
            pending.result()
    aligned = filled - filled % _ALIGNMENT
    file.write(buffer[:aligned])
    file.write_cached(buffer[aligned:filled])


class _DirectFile:
    """A file written with O_DIRECT until a write is refused or cut short, then through the cache.

    Args:
        descriptor: of a file open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct = self._set_direct(True)

    def write(self, view: memoryview) -> None:
        """Write all of a buffer that begins at an aligned address."""
        while view:
            try:
                written = os.write(self._descriptor, view)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                written = 0  # this filesystem wants another alignment
            view = view[written:]
            if self._direct and view:
                self._direct = self._set_direct(False)

    def write_cached(self, view: memoryview) -> None:
        """Write bytes of any alignment, and whatever follows, through the page cache."""
        if self._direct:
            self._direct = self._set_direct(False)
        self.write(view)

    def _set_direct(self, on: bool) -> bool:
        """Switch O_DIRECT on or off; return whether it is on."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(
                self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
            )
        except OSError:
            return False
        return on
