"""Unix-domain sockets between processes of one machine: frames, and end-of-file at a death.

A shard listens under an abstract name (no file), known only to processes that were given it; both
ends check that the other runs as the same user, and the caller shows a token. Memory is handed over
with the greeting. Sockets are closed in forked children, so that a data loader's processes do not
keep a dead worker's connection open. Nothing here knows what a frame means.
"""

import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from distnadam.errors import ArenaError, LaneError
from distnadam.protocol.frames import HEADER, VERSION, Frames, check_version, frame_of
from distnadam.threads import start
from distnadam.transport.forked_sockets import keep_from_children
from distnadam.transport.spinning import spin

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("distnadam")

_GREETING_S = 10.0
_READ_BYTES = 1 << 16
_FEW_BYTES = 512
"""Bytes of a read that waits: more than any frame of an ordinary round has."""
AWAIT_S = 0.02
"""Seconds for which one connection is waited for while others may have something too."""
_AWAITED = struct.pack("@ll", 0, int(AWAIT_S * 1e6))
"""As the system's timeval."""
_AT_ONCE = socket.MSG_DONTWAIT


def use_batch_scheduling() -> None:
    """Schedule this thread as batch work, so that a thread it wakes does not preempt it.

    With more processes than cores, a thread that wakes several others is else preempted at each. A
    thread whose policy was set keeps it; forked children and new threads have the default one.
    """
    with suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))


@dataclass(frozen=True)
class Address:
    """The name under which a shard listens, and the token that it requires from callers."""

    name: str
    token: str


class Connection:
    """One end of a connection: sends and receives whole frames, and waits for the peer only where
    `receive` is asked to.

    `is_broken` says whether something was sent to a peer that had closed.

    Args:
        sock: a connected socket, which this object owns.
        on_blocked: called if a frame did not fit into the socket; `flush` then sends the rest.
    """

    def __init__(
        self, sock: socket.socket, on_blocked: Callable[["Connection"], None] | None = None
    ) -> None:
        self._socket = sock
        self._on_blocked = on_blocked
        self._frames = Frames()
        self._unsent = bytearray()
        self._lock = threading.Lock()
        self.greeting: dict[str, Any] | None = None
        self.is_broken = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _AWAITED)
        sock.setblocking(True)  # for `receive`; every other call says that it does not wait
        keep_from_children(sock)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    def send(self, frame: bytes) -> bool:
        """Send as much of a frame as the socket takes; return whether nothing is left for `flush`.

        Sending to a dead peer does nothing; receiving from it returns None.
        """
        with self._lock:
            if not self._unsent:
                try:
                    frame = frame[self._socket.send(frame, _AT_ONCE) :]
                except BlockingIOError:
                    pass
                except OSError:
                    self.is_broken = True
                    return True
                if not frame:
                    return True
            self._unsent += frame
        if self._on_blocked is not None:
            self._on_blocked(self)
        return False

    def flush(self) -> bool:
        """Send what is left; return whether nothing is left then."""
        with self._lock:
            while self._unsent:
                try:
                    del self._unsent[: self._socket.send(self._unsent, _AT_ONCE)]
                except BlockingIOError:
                    return False
                except OSError:
                    self.is_broken = True
                    self._unsent.clear()
            return True

    @property
    def has_unsent(self) -> bool:
        """Whether something is left for `flush`."""
        return bool(self._unsent)

    def receive(self, *, waits: bool = False) -> list[bytes] | None:
        """Return the bodies of the frames that have come whole, None once the peer has closed.

        Where it `waits`, it does so for `AWAIT_S` at most, and in one call of the system.
        """
        try:
            data = self._socket.recv(*((_FEW_BYTES,) if waits else (_READ_BYTES, _AT_ONCE)))
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._frames.feed(data) if data else None

    def receive_soon(self, *, spins: bool) -> list[bytes] | None:
        """Return what comes soon, as `receive` where it waits; before, ask for it without waiting,
        again and again, where this thread `spins`.
        """
        if spins and (found := spin(self._receive_now)) != []:
            return found
        return self.receive(waits=True)

    def _receive_now(self, _: float) -> list[bytes] | None:
        return self.receive()

    def receive_greeting(self) -> tuple[bytes, list[int]]:
        """Return the peer's first bytes and the descriptors that came with them."""
        data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, 4, _AT_ONCE)
        return data, list(fds)

    def send_greeting(self, content: dict[str, Any], fds: list[int]) -> None:
        """Send the first frame, with descriptors."""
        socket.send_fds(self._socket, [frame_of(msgpack.packb(content))], fds)

    def close(self) -> None:
        """Close the socket; the peer receives end-of-file."""
        self._socket.close()


def connect(
    address: Address, greeting: dict[str, Any], fds: list[int]
) -> tuple[Connection, dict[str, Any], list[int]]:
    """Connect to a shard and exchange greetings.

    Returns:
        The connection, the shard's greeting and its descriptors, which the caller owns.

    Raises:
        LaneError: no process of this user listens there, or it refused the greeting.
    """
    try:
        sock = socket.socket(socket.AF_UNIX)
    except OSError as error:  # too many files are open
        raise LaneError(f"no lane to the socket {address.name}: {error}") from error
    try:
        sock.settimeout(_GREETING_S)
        sock.connect("\0" + address.name)
        _check_same_user(sock)
        connection = Connection(sock)
        sock.settimeout(_GREETING_S)
        connection.send_greeting({"version": VERSION, "token": address.token, **greeting}, fds)
        data, received = connection.receive_greeting()
        if not data:
            raise LaneError("it closed the connection at the greeting")
        answer = msgpack.unpackb(data[HEADER.size :])
        if "refused" in answer:
            raise LaneError(str(answer["refused"]))
        sock.setblocking(True)
        return connection, answer, received
    except (OSError, ValueError, LaneError) as error:
        sock.close()
        raise LaneError(f"no lane to the socket {address.name}: {error}") from error


class ConnectionServer:
    """Accepts connections in one thread and hands every frame to `on_frame`.

    Args:
        on_greeting: called with a greeting and the list of its descriptors, from which it removes
            those that it keeps; returns the answer and the descriptors to send, or raises LaneError
            or ArenaError.
        on_frame: called with the connection and a frame's body, in the server's thread; a LaneError
            closes the connection.
        on_end: called with the connection once its peer is gone.
        loop: the running event loop in whose thread this is done; None for a thread of its own.
        rest_s: seconds for which its own thread rests after what has come, so that frames gather.
        spins: whether its own thread spins for a little before it sleeps.
        on_idle: called by its own thread before it waits; returns whether it would be called again
            at once: then nothing is waited for in between.

    Raises:
        LaneError: the system has no socket, descriptor or thread for it.
    """

    def __init__(
        self,
        on_greeting: Callable[
            [Connection, dict[str, Any], list[int]], tuple[dict[str, Any], list[int]]
        ],
        on_frame: Callable[[Connection, bytes], None],
        on_end: Callable[[Connection], None],
        loop: "asyncio.AbstractEventLoop | None" = None,
        rest_s: float = 0.0,
        *,
        spins: bool = False,
        on_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rest_s = rest_s
        self._spins = spins
        self._on_idle = on_idle
        self._on_greeting = on_greeting
        self._on_frame = on_frame
        self._on_end = on_end
        self._loop = loop
        self.address = Address(f"distnadam-{secrets.token_hex(16)}", secrets.token_hex(16))
        self._connections: dict[int, Connection] = {}
        try:
            self._listen()
        except (OSError, RuntimeError) as error:  # no descriptors, or no thread
            raise LaneError(f"no socket to listen at: {error}") from error

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + self.address.name)
        self._listener.listen(1024)
        self._listener.setblocking(False)
        keep_from_children(self._listener)
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._stop, select.EPOLLIN)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="connections", daemon=True)
        if self._loop is None:
            start(self._thread)
        else:
            self._loop.call_soon_threadsafe(
                lambda loop, fd: loop.add_reader(fd, self._attend_ready, 0),
                self._loop,
                self._poll.fileno(),
            )

    def close(self) -> None:
        """Stop listening and close every connection; do nothing if called again.

        Where an event loop serves, call this from another thread, while the loop runs.
        """
        if not self._closed.is_set():
            os.eventfd_write(self._stop, 1)
            self._closed.wait()
            if self._loop is None:
                self._thread.join()
            os.close(self._stop)

    def _serve(self) -> None:
        use_batch_scheduling()
        while not self._closed.is_set():
            self._attend_ready(0.0 if self._on_idle() else None)
            if self._rest_s:
                time.sleep(self._rest_s)

    def _attend_ready(self, timeout_s: float | None) -> None:
        """Take what has come, after waiting for it so long; end if that was asked."""
        poll = self._poll.poll
        for fd, events in (self._spins and spin(poll)) or poll(timeout_s):
            if fd == self._stop:
                self._close_all()
                self._closed.set()
                return
            if fd == self._listener.fileno():
                self._accept()
            elif (connection := self._connections.get(fd)) is not None:
                self._attend(connection, events)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # the peer closed already, or too many files are open
        try:
            _check_same_user(sock)
        except LaneError:
            sock.close()
            return
        connection = Connection(sock, on_blocked=self._await_room)
        self._connections[connection.fileno()] = connection
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def _attend(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT and connection.flush():
            self._poll.modify(connection.fileno(), select.EPOLLIN)
        if not events & ~select.EPOLLOUT:
            return
        if connection.greeting is None:
            self._attempt(connection, self._greet, connection)
        else:
            self._attempt(connection, lambda: self._hand_over(connection, connection.receive()))

    def take(self, connection: Connection, frames: list[bytes] | None) -> None:
        """Do with what `Connection.receive` has returned as with what the server has read itself;
        call this in its thread.
        """
        self._attempt(connection, self._hand_over, connection, frames)

    def _hand_over(self, connection: Connection, frames: list[bytes] | None) -> None:
        for frame in frames or []:
            self._on_frame(connection, frame)
        if frames is None:
            self._end(connection)

    def _attempt(self, connection: Connection, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except (LaneError, OSError, ValueError):
            self._end(connection)
        except Exception:  # of one connection; the others are served on
            log.exception("a connection failed")
            self._end(connection)

    def _greet(self, connection: Connection) -> None:
        try:
            data, fds = connection.receive_greeting()
        except BlockingIOError:
            return  # the event was of an earlier connection with this descriptor
        try:
            greeting = msgpack.unpackb(data[HEADER.size :]) if data else {}
            if not isinstance(greeting, dict):
                raise LaneError("the greeting is no mapping")
            if not secrets.compare_digest(str(greeting.get("token")), self.address.token):
                raise LaneError("the token is wrong")
            check_version(greeting.get("version"))
            connection.greeting = greeting
            answer, given = self._on_greeting(connection, greeting, fds)
        except (LaneError, ArenaError) as error:
            connection.send_greeting({"refused": str(error)}, [])
            raise LaneError(str(error)) from error
        finally:
            for fd in fds:  # those that `on_greeting` did not take from the list
                with suppress(OSError):
                    os.close(fd)
        connection.send_greeting(answer, given)

    def _await_room(self, connection: Connection) -> None:
        with suppress(OSError, ValueError):
            self._poll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _end(self, connection: Connection) -> None:
        self._connections.pop(connection.fileno(), None)
        connection.close()  # removes it from the poll too
        if connection.greeting is not None:
            self._on_end(connection)

    def _close_all(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._poll.fileno())
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._poll.close()
        self._listener.close()


def _check_same_user(sock: socket.socket) -> None:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise LaneError(f"its process runs as user {user}, this one as {os.geteuid()}")
