"""Notice, at once, that processes of this machine ended: a line to each, whose end tells."""

import os
import select
import threading
from collections.abc import Callable

from distnadam.errors import LaneError
from distnadam.transport.connection import Address, Connection, call


class ProcessWatch:
    """Tells, from a thread of its own, when processes that listen somewhere end."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._watched: dict[int, tuple[Connection, Callable[[], None]]] = {}
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def add(self, address: Address, on_end: Callable[[], None]) -> None:
        """Watch the process that listens there; one that cannot be reached has ended."""
        try:
            line, _, fds = call(address, {"rank": None}, [])
        except LaneError:
            on_end()
            return
        for fd in fds:
            os.close(fd)
        self._watched[line.fileno()] = (line, on_end)
        self._poll.register(line.fileno(), select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                line, on_end = self._watched[fd]
                if line.receive() is None:
                    del self._watched[fd]
                    line.close()
                    on_end()
