"""Write a file past the page cache where its filesystem can: what is saved is not read soon, and the pages would be taken from others.

A cache that has to find fresh pages makes saving slower by an unpredictable factor; so does flushing it. The state is copied to a
buffer with the alignment that such writes need, for a shard's range begins anywhere.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable

_BUFFER_BYTES = 4 << 20
_ALIGNMENT = 4096


def write_pieces(descriptor: int, pieces: Iterable[memoryview]) -> None:
    """Write pieces one after another to a new, empty file; raise OSError where the system refuses."""
    direct = _set_direct(descriptor, True)
    buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
    filled = 0
    for piece in pieces:
        while piece:
            part, piece = piece[: _BUFFER_BYTES - filled], piece[_BUFFER_BYTES - filled :]
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            if filled == _BUFFER_BYTES:
                direct = _write(descriptor, buffer, direct)
                filled = 0
    whole = filled - filled % _ALIGNMENT
    direct = _write(descriptor, buffer[:whole], direct)
    if direct:
        _set_direct(descriptor, False)
    _write(descriptor, buffer[whole:filled], False)


def _write(descriptor: int, view: memoryview, direct: bool) -> bool:
    """Write all of it; return whether the next may go past the cache, which it may no more after a part was refused or left over."""
    while view:
        try:
            written = os.write(descriptor, view)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            written = 0  # another alignment is wanted here
        view = view[written:]
        if direct and view:
            direct = _set_direct(descriptor, False)
    return direct


def _set_direct(descriptor: int, on: bool) -> bool:
    """Switch the cache off or on for a file; return whether it is off."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on
