"""Connecting to a process of another host that listens."""

import asyncio
import os
import socket
import ssl
from functools import cache

from distnadam.transport.forked_sockets import keep_from_children
from distnadam.transport.loop_thread import LoopThread
from distnadam.transport.tcp_connection import (
    HANDSHAKE_S,
    Endpoint,
    TcpConnection,
)
from distnadam.transport.tls import tls

_CONNECT_S = 5.0


def dialling_thread() -> LoopThread:
    """Return the loop of all connections that this process opens; a forked child has its own."""
    return _thread_of(os.getpid())


@cache
def _thread_of(pid: int) -> LoopThread:
    return LoopThread()


def dial(connection: TcpConnection, endpoint: Endpoint) -> None:
    """Connect to an endpoint; the connection's receiver learns when the peer has proven itself.

    Raises:
        OSError, TimeoutError, LaneError: nobody answers there.
    """
    context = tls(ssl.Purpose.SERVER_AUTH)
    sock = socket.create_connection((endpoint.host, endpoint.port), _CONNECT_S)
    keep_from_children(sock)
    sock.setblocking(False)
    thread = dialling_thread()
    connection.turns = thread.turns
    try:
        thread.run(_adopt(connection, sock, context, endpoint.host), HANDSHAKE_S)
    except BaseException:
        thread.call(sock.close)  # after the loop has left it alone
        raise


async def _adopt(
    connection: TcpConnection, sock: socket.socket, context: ssl.SSLContext | None, host: str
) -> None:
    name = None if context is None else host
    await asyncio.get_running_loop().create_connection(
        lambda: connection, sock=sock, ssl=context, server_hostname=name
    )
