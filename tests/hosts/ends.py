"""`python -m tests.hosts.ends listen HOST`, or `dial HOST PORT SECRET`: one end of a connection.

The end that listens answers each message. Each line of the other's input sends as many bytes; both
print what comes, and why the connection ends.
"""

import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.transport.tcp_connection import (
    Endpoint,
    Parts,
    Receiver,
    TcpConnection,
    greeting,
)
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.tcp_listener import TcpListener
from tests.hosts.program import say


class End(Receiver):
    """Says what comes."""

    def __init__(self) -> None:
        self.listener: TcpListener | None = None
        self.is_proven = threading.Event()

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        if self.listener is not None:
            self.listener.admit(connection)
        self.is_proven.set()

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        land = np.empty(num_bytes, "u1")
        return land, [land.data] if num_bytes else []

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        say(arrived=what.nbytes)
        if self.listener is not None:
            connection.send(b"got it")

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        if self.listener is not None:
            self.listener.forget(connection)
        say(ended=why)


def main(how: str, host: str, *rest: str) -> None:
    """Run the command."""
    end = End()
    if how == "listen":
        listener = TcpListener(end, "this end", host, None)
        end.listener = listener
        say(port=listener.endpoint.port, secret=listener.endpoint.secret.hex())
        sys.stdin.read()
        listener.close()
        return
    port, secret = int(rest[0]), bytes.fromhex(rest[1])
    connection = TcpConnection(end, secret, greeting(0))
    dial(connection, Endpoint(host, port, secret))
    end.is_proven.wait()
    say(ready=True)
    for line in sys.stdin:
        parts = [np.zeros(int(line), "u1").data] if int(line) else []
        dialling_thread().call(connection.send, b"take it", parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
