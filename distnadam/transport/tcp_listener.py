"""Listening for other hosts: connections are accepted in a thread of their own, and who does not
prove himself soon is hung up on. What comes over them is the receiver's.
"""

import asyncio
import random
import secrets
import socket
import ssl
from contextlib import suppress

from distnadam.errors import LaneError
from distnadam.transport.forked_sockets import keep_from_children
from distnadam.transport.loop_thread import LoopThread
from distnadam.transport.tcp_connection import (
    HANDSHAKE_S,
    Endpoint,
    Receiver,
    TcpConnection,
)
from distnadam.transport.tls import tls

_MOST_STRANGERS = 64
_BACKLOG = 100
_START_S = 10.0
_AGAIN_S = 0.1


class TcpListener:
    """A port at which others connect who know its secret.

    Args:
        receiver: takes what comes; calls `admit` and `forget`.
        who: what listens, for errors.
        host: the address to listen at.
        ports: the first and the last port to try; None for any.

    Attributes:
        endpoint: where it listens.
        thread: the connections'.

    Raises:
        LaneError: it cannot listen there.
    """

    def __init__(
        self, receiver: Receiver, who: str, host: str, ports: tuple[int, int] | None
    ) -> None:
        self._receiver = receiver
        self._who = who
        self._secret = secrets.token_bytes(32)
        self._strangers: dict[TcpConnection, asyncio.TimerHandle] = {}
        self._open: dict[TcpConnection, socket.socket] = {}
        self._again: asyncio.TimerHandle | None = None
        self._none_open = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.thread = LoopThread()
        try:
            port = self.thread.run(self._listen(host, ports), _START_S)
        except (LaneError, TimeoutError) as error:
            self.thread.close()
            raise LaneError(f"{who} cannot listen at {host}: {error}") from error
        self.endpoint = Endpoint(host, port, self._secret)

    async def _listen(self, host: str, ports: tuple[int, int] | None) -> int:
        context = tls(ssl.Purpose.CLIENT_AUTH)
        choices = [0] if ports is None else list(range(ports[0], ports[1] + 1))
        random.shuffle(choices)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in choices:
            with suppress(OSError):
                self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
                keep_from_children(self._socket)
                self._socket.setblocking(False)
                self.thread.loop.add_reader(self._socket, self._accept, context)
                taken: int = self._socket.getsockname()[1]
                return taken
        among = "any port" if ports is None else f"a port from {ports[0]} to {ports[1]}"
        raise LaneError(f"{among} is not to be had")

    def _accept(self, context: ssl.SSLContext | None) -> None:
        loop = self.thread.loop
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the stranger has gone
            return
        except OSError:  # no descriptor is left
            loop.remove_reader(self._socket)
            self._again = loop.call_later(
                _AGAIN_S, loop.add_reader, self._socket, self._accept, context
            )
            return
        keep_from_children(sock)
        sock.setblocking(False)
        connection = TcpConnection(self._receiver, self._secret)
        connection.turns = self.thread.turns
        self._open[connection] = sock
        if len(self._strangers) >= _MOST_STRANGERS:
            self._hang_up(next(iter(self._strangers)), "too many others are waiting")
        self._strangers[connection] = loop.call_later(
            HANDSHAKE_S, self._hang_up, connection, "it did not prove itself in time"
        )
        task = loop.create_task(self._adopt(connection, sock, context))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _adopt(
        self, connection: TcpConnection, sock: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        try:
            await self.thread.loop.connect_accepted_socket(lambda: connection, sock, ssl=context)
        except OSError:  # of TLS, before the connection was made: it does not learn of its end
            self.forget(connection)

    def _hang_up(self, connection: TcpConnection, why: str) -> None:
        """End a connection, though TLS may not have made it yet."""
        if (timer := self._strangers.pop(connection, None)) is not None:
            timer.cancel()
        connection.close(why)
        with suppress(OSError):  # it has ended by itself
            self._open[connection].shutdown(socket.SHUT_RDWR)

    def admit(self, connection: TcpConnection) -> None:
        """Keep a connection whose peer has proven itself; in the connections' thread."""
        self._strangers.pop(connection).cancel()

    def forget(self, connection: TcpConnection) -> None:
        """Forget a connection that has ended; in the connections' thread."""
        self._open.pop(connection, None)
        if not self._open:
            self._none_open.set()
        if (timer := self._strangers.pop(connection, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Stop listening, close the connections and end their thread."""
        with suppress(TimeoutError):
            self.thread.run(self._close(), _START_S)
        self.thread.close()

    async def _close(self) -> None:
        self.thread.loop.remove_reader(self._socket)
        if self._again is not None:
            self._again.cancel()
        self._socket.close()
        for connection in list(self._open):
            self._hang_up(connection, f"{self._who} has closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._open:
            self._none_open.clear()
            await self._none_open.wait()
