"""Notices at once that processes of this machine ended: their connections do."""

import os
import select
import threading
from collections.abc import Callable

from distnadam.errors import LaneError
from distnadam.threads import start
from distnadam.transport.unix_connection import Address, Connection, connect


class ProcessWatch:
    """Calls back, from a thread of its own, when processes that listen at an address end."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._watched: dict[int, tuple[Connection, Callable[[], None]]] = {}
        start(threading.Thread(target=self._run, name="watch", daemon=True))

    def add(self, address: Address, on_end: Callable[[], None]) -> None:
        """Watch the process that listens there; call `on_end` now if it cannot be reached."""
        try:
            connection, _, fds = connect(address, {"rank": None}, [])
        except LaneError:
            on_end()
            return
        for fd in fds:
            os.close(fd)
        self._watched[connection.fileno()] = (connection, on_end)
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                connection, on_end = self._watched[fd]
                if connection.receive() is None:
                    del self._watched[fd]
                    connection.close()
                    on_end()
