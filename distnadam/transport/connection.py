"""Unix-domain sockets between the workers and the shards of one machine: "pushed k", "applied k",
and end-of-file at a death.

A shard listens under an abstract name (no file) that only those who were told know; both ends make
sure that the other runs as the same user, and the caller shows a token. Memory is handed over with
the greeting. Sockets are closed in forked children, so that a data loader's processes do not keep a
dead worker's line open.
"""

import os
import secrets
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgpack

from distnadam.errors import LaneError
from distnadam.protocol.codec import HEADER, Frames

_GREETING_S = 10.0
_READ_BYTES = 1 << 16

_open: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def use_batch_scheduling() -> None:
    """Schedule this thread as batch work, so that whoever its bell wakes does not interrupt it on
    its own core.

    With more processes than cores, a thread that rings several bells is else preempted at each. A
    thread that was given a policy keeps it; forked children and new threads have the ordinary one.
    """
    with suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def _close_in_child() -> None:
    for line in list(_open):
        line.close()


os.register_at_fork(after_in_child=_close_in_child)


@dataclass(frozen=True)
class Address:
    """Where a shard listens, and the token that it wants to see; known only to those who may
    call.
    """

    name: str
    token: str


class Connection:
    """One end of a connection: whole frames out without ever waiting for the peer, whole frames
    in.
    """

    def __init__(
        self, connection: socket.socket, on_blocked: Callable[["Connection"], None] | None = None
    ) -> None:
        self._socket, self._on_blocked = connection, on_blocked
        self._frames, self._unsent, self._lock = Frames(), bytearray(), threading.Lock()
        self.greeting: dict[str, Any] | None = None
        connection.setblocking(False)
        _open.add(connection)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    def send(self, frame: bytes) -> bool:
        """Send a frame, or as much as the socket takes, and return whether it is all; the rest goes
        by `flush`.

        Sending to a dead peer does nothing: who reads will see its end.
        """
        with self._lock:
            if not self._unsent:
                try:
                    frame = frame[self._socket.send(frame) :]
                except BlockingIOError:
                    pass
                except OSError:
                    return True
                if not frame:
                    return True
            self._unsent += frame
        if self._on_blocked is not None:
            self._on_blocked(self)
        return False

    def flush(self) -> bool:
        """Send what is left; return whether nothing is."""
        with self._lock:
            while self._unsent:
                try:
                    del self._unsent[: self._socket.send(self._unsent)]
                except BlockingIOError:
                    return False
                except OSError:
                    self._unsent.clear()
            return True

    def receive(self) -> list[bytes] | None:
        """Return the bodies of the frames that are whole now, None at the end of the line."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return list(self._frames.feed(data)) if data else None

    def receive_greeting(self) -> tuple[bytes, list[int]]:
        """Return the first bytes of the peer and the descriptors that came with them."""
        data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, 4)
        return data, list(fds)

    def send_greeting(self, content: dict[str, Any], fds: list[int]) -> None:
        """Send the first frame, with descriptors."""
        body = msgpack.packb(content)
        socket.send_fds(self._socket, [HEADER.pack(len(body)) + body], fds)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def call(
    address: Address, greeting: dict[str, Any], fds: list[int]
) -> tuple[Connection, dict[str, Any], list[int]]:
    """Connect to a shard and exchange greetings; return the line, the shard's greeting and its
    descriptors.

    Raises:
        LaneError: nobody of ours listens there, or the greeting was refused.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(_GREETING_S)
        connection.connect("\0" + address.name)
        _check_same_user(connection)
        line = Connection(connection)
        connection.settimeout(_GREETING_S)
        line.send_greeting({"token": address.token, **greeting}, fds)
        data, received = line.receive_greeting()
        if not data:
            raise LaneError("it hung up at the greeting")
        answer = msgpack.unpackb(data[4:])
        if "refused" in answer:
            raise LaneError(str(answer["refused"]))
        connection.setblocking(False)
        return line, answer, received
    except (OSError, ValueError, LaneError) as error:
        connection.close()
        raise LaneError(f"no lane to the socket {address.name}: {error}") from error


class Server:
    """Listens in a thread of its own and hands every frame to `on_frame`.

    Args:
        on_greeting: called with a greeting and its descriptors; returns the answer and the
            descriptors to send, or raises LaneError.
        on_frame: called with the line and a frame's body, in the server's thread.
        on_end: called with the line once its peer is gone.
    """

    def __init__(
        self,
        on_greeting: Callable[
            [Connection, dict[str, Any], list[int]], tuple[dict[str, Any], list[int]]
        ],
        on_frame: Callable[[Connection, bytes], None],
        on_end: Callable[[Connection], None],
    ) -> None:
        self._on_greeting, self._on_frame, self._on_end = on_greeting, on_frame, on_end
        self.address = Address(f"distnadam-{secrets.token_hex(16)}", secrets.token_hex(16))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + self.address.name)
        self._listener.listen(1024)
        self._listener.setblocking(False)
        _open.add(self._listener)
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._stop, select.EPOLLIN)
        self._lines: dict[int, Connection] = {}
        self._thread = threading.Thread(target=self._serve, name="doorbell", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and hang up on everyone."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _serve(self) -> None:
        use_batch_scheduling()
        while True:
            for fd, events in self._poll.poll():
                if fd == self._stop:
                    self._hang_up()
                    return
                if fd == self._listener.fileno():
                    self._accept()
                elif (line := self._lines.get(fd)) is not None:
                    self._attend(line, events)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it hung up already, or there are too many files open
        try:
            _check_same_user(connection)
        except LaneError:
            connection.close()
            return
        line = Connection(connection, on_blocked=self._await_room)
        self._lines[line.fileno()] = line
        self._poll.register(line.fileno(), select.EPOLLIN)

    def _attend(self, line: Connection, events: int) -> None:
        if events & select.EPOLLOUT and line.flush():
            self._poll.modify(line.fileno(), select.EPOLLIN)
        if events & ~select.EPOLLOUT:
            try:
                if line.greeting is None:
                    self._greet(line)
                    return
                frames = line.receive()
                for frame in frames or []:
                    self._on_frame(line, frame)
                if frames is None:
                    self._end(line)
            except (LaneError, OSError, ValueError):
                self._end(line)

    def _greet(self, line: Connection) -> None:
        try:
            data, fds = line.receive_greeting()
        except BlockingIOError:
            return  # the event was of an older line with this descriptor
        greeting = msgpack.unpackb(data[4:]) if data else {}
        try:
            if not secrets.compare_digest(str(greeting.get("token")), self.address.token):
                raise LaneError("the token is wrong")
            line.greeting = greeting
            answer, given = self._on_greeting(line, greeting, fds)
        except LaneError as error:
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)
            line.send_greeting({"refused": str(error)}, [])
            raise
        line.send_greeting(answer, given)

    def _await_room(self, line: Connection) -> None:
        with suppress(OSError, ValueError):
            self._poll.modify(line.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _end(self, line: Connection) -> None:
        self._lines.pop(line.fileno(), None)
        line.close()  # leaves the poll too
        if line.greeting is not None:
            self._on_end(line)

    def _hang_up(self) -> None:
        for line in list(self._lines.values()):
            line.close()
        self._lines.clear()
        self._poll.close()
        self._listener.close()


def _check_same_user(connection: socket.socket) -> None:
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if user != os.geteuid():
        raise LaneError(f"its process runs as user {user}, this one as {os.geteuid()}")
