"""Write a file past the page cache where its filesystem can: what is saved is not read soon, and
the pages would be taken from others.

A cache that has to find fresh pages makes saving slower by an unpredictable factor; so does
flushing it. The state is copied to a buffer with the alignment that such writes need, for a shard's
range begins anywhere, while another buffer is being written.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

_BUFFER_BYTES = 4 << 20
_ALIGNMENT = 4096


def write_pieces(descriptor: int, pieces: Iterable[memoryview]) -> None:
    """Write pieces one after another to a new, empty file; raise OSError where the system
    refuses.
    """
    file, filled = _File(descriptor), 0
    buffer, other = (memoryview(mmap.mmap(-1, _BUFFER_BYTES)) for _ in range(2))
    with ThreadPoolExecutor(1, "disk") as disk:
        on_its_way: Future[None] | None = None
        for piece in pieces:
            while piece:
                part, piece = piece[: _BUFFER_BYTES - filled], piece[_BUFFER_BYTES - filled :]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if filled == _BUFFER_BYTES:
                    if on_its_way is not None:
                        on_its_way.result()
                    on_its_way, filled = disk.submit(file.write, buffer), 0
                    buffer, other = other, buffer
        if on_its_way is not None:
            on_its_way.result()
    whole = filled - filled % _ALIGNMENT
    file.write(buffer[:whole])
    file.write_through_cache(buffer[whole:filled])


class _File:
    """A file whose writes pass the cache by until one is refused or cut short."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct = self._pass_cache(True)

    def write(self, view: memoryview) -> None:
        """Write all of it."""
        while view:
            try:
                written = os.write(self._descriptor, view)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                written = 0  # another alignment is wanted here
            view = view[written:]
            if self._direct and view:
                self._direct = self._pass_cache(False)

    def write_through_cache(self, view: memoryview) -> None:
        """Write what has no alignment, and all that follows."""
        if self._direct:
            self._direct = self._pass_cache(False)
        self.write(view)

    def _pass_cache(self, on: bool) -> bool:
        """Switch the cache off or on; return whether it is off."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(
                self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
            )
        except OSError:
            return False
        return on
