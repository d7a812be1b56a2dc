"""Sockets that a forked child closes, such as a data loader's process: else the peer would not see
that the process which owns them has died.
"""

import os
import socket
from weakref import WeakSet

_kept: "WeakSet[socket.socket]" = WeakSet()


def keep_from_children(sock: socket.socket) -> None:
    """Close a socket in every child that this process forks from now on."""
    _kept.add(sock)


def _close_in_child() -> None:
    for sock in list(_kept):
        sock.close()


os.register_at_fork(after_in_child=_close_in_child)
