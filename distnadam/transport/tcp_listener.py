"""Listening for other hosts: connections are accepted in a thread of their own, and who does not
prove himself soon is hung up on. What comes over them is the receiver's.
"""

import asyncio
import random
import secrets
import ssl
from contextlib import suppress

from distnadam.errors import LaneError
from distnadam.transport.loop_thread import LoopThread
from distnadam.transport.tcp_connection import HANDSHAKE_S, Endpoint, Receiver, TcpConnection
from distnadam.transport.tls import tls

_MOST_STRANGERS = 64
_START_S = 10.0


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
        self._open: set[TcpConnection] = set()
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
        for port in choices:
            with suppress(OSError):
                self._server = await asyncio.get_running_loop().create_server(
                    self._accept, host, port, ssl=context
                )
                taken: int = self._server.sockets[0].getsockname()[1]
                return taken
        among = "any port" if ports is None else f"a port from {ports[0]} to {ports[1]}"
        raise LaneError(f"{among} is not to be had")

    def _accept(self) -> TcpConnection:
        connection = TcpConnection(self._receiver, self._secret)
        connection.turns = self.thread.turns
        self._open.add(connection)
        if len(self._strangers) >= _MOST_STRANGERS:
            first = next(iter(self._strangers))
            self._strangers.pop(first).cancel()
            first.close("too many others are waiting")
        self._strangers[connection] = self.thread.loop.call_later(
            HANDSHAKE_S, connection.close, "it did not prove itself in time"
        )
        return connection

    def admit(self, connection: TcpConnection) -> None:
        """Keep a connection whose peer has proven itself; in the connections' thread."""
        self._strangers.pop(connection).cancel()

    def forget(self, connection: TcpConnection) -> None:
        """Forget a connection that has ended; in the connections' thread."""
        self._open.discard(connection)
        if (timer := self._strangers.pop(connection, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Stop listening, close the connections and end their thread."""
        with suppress(TimeoutError):
            self.thread.run(self._close(), _START_S)
        self.thread.close()

    async def _close(self) -> None:
        self._server.close()
        while self._open:
            for connection in self._open:
                connection.close(f"{self._who} has closed")
            await asyncio.sleep(0)
