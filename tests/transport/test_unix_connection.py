"""The sockets: greetings, large frames, strangers refused, and the end of a connection at a death,
also of a process that had forked.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from distnadam.errors import LaneError
from distnadam.protocol.frames import VERSION, frame_of
from distnadam.transport.loop_thread import LoopThread
from distnadam.transport.unix_connection import Address, Connection, ConnectionServer, connect


class Echo:
    """A server that sends every frame back, and remembers who came and went."""

    def __init__(self, thread: LoopThread | None = None) -> None:
        self.greeted: list[Any] = []
        self.ended = threading.Semaphore(0)
        self.server = ConnectionServer(
            self.greet,
            self.frame,
            lambda connection: self.ended.release(),
            None if thread is None else thread.loop,
        )

    def greet(
        self, connection: Connection, greeting: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if greeting["name"] == "unwanted":
            raise LaneError("you are not wanted")
        self.greeted.append(greeting["name"])
        return {"hello": greeting["name"]}, []

    def frame(self, connection: Connection, body: bytes) -> None:
        connection.send(frame_of(body))


def serving() -> int:
    """The threads of servers in this process."""
    return sum(thread.name == "connections" for thread in threading.enumerate())


@pytest.fixture(params=["own thread", "event loop"])
def echo(request: pytest.FixtureRequest) -> Iterator[Echo]:
    thread = LoopThread() if request.param == "event loop" else None
    before = serving()
    echo = Echo(thread)
    assert serving() == before + (thread is None)
    yield echo
    echo.server.close()
    assert serving() == before
    echo.server.close()  # again, which does nothing
    if thread is not None:
        thread.close()


def receive(connection: Connection, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        select.select([connection], [connection] if not connection.flush() else [], [])
        frames = connection.receive()
        assert frames is not None, "the peer closed"
        got += frames
    return got


def test_greetings_are_exchanged_and_frames_come_back_in_order(echo: Echo) -> None:
    connection, answer, fds = connect(echo.server.address, {"name": "me"}, [])
    assert (answer, fds) == ({"hello": "me"}, [])
    for number in range(50):
        connection.send(frame_of(bytes([number])))
    assert receive(connection, 50) == [bytes([number]) for number in range(50)]
    connection.close()
    echo.ended.acquire()


def test_frames_larger_than_any_buffer_go_both_ways_and_delay_no_other(echo: Echo) -> None:
    connection, _, _ = connect(echo.server.address, {"name": "large"}, [])
    other, _, _ = connect(echo.server.address, {"name": "small"}, [])
    body = os.urandom(20 << 20)
    assert not connection.send(frame_of(body)), "it does not fit at once, and does not wait"
    other.send(frame_of(b"x"))
    assert receive(other, 1) == [b"x"]
    assert receive(connection, 1) == [body]
    connection.close()
    other.close()


class Failing(Echo):
    """A server whose own code fails at some frames."""

    def frame(self, connection: Connection, body: bytes) -> None:
        if body == b"fail":
            raise AttributeError("a bug")
        super().frame(connection, body)


def test_a_bug_at_one_connection_ends_that_one_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = Failing()
    first, _, _ = connect(failing.server.address, {"name": "first"}, [])
    second, _, _ = connect(failing.server.address, {"name": "second"}, [])
    first.send(frame_of(b"fail"))
    failing.ended.acquire()
    second.send(frame_of(b"x"))
    assert receive(second, 1) == [b"x"]
    assert first.receive() is None
    assert "a connection failed" in caplog.text and "a bug" in caplog.text
    first.close()
    second.close()
    failing.server.close()


def test_a_wrong_token_and_a_refused_greeting_say_so(echo: Echo) -> None:
    with pytest.raises(LaneError, match="the token is wrong"):
        connect(Address(echo.server.address.name, "0" * 32), {"name": "me"}, [])
    with pytest.raises(LaneError, match="you are not wanted"):
        connect(echo.server.address, {"name": "unwanted"}, [])
    with pytest.raises(LaneError, match="no lane to the socket distnadam-nowhere"):
        connect(Address("distnadam-nowhere", ""), {}, [])
    assert echo.greeted == []


def test_a_peer_of_another_version_is_refused_by_name(echo: Echo) -> None:
    for version in (VERSION + 1, None):
        with pytest.raises(LaneError, match=f"expected version {VERSION} .* got {version}: inst"):
            connect(echo.server.address, {"name": "me", "version": version}, [])
    assert echo.greeted == []


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\0\0\0\x05",  # a whole frame, whose body is a number
        b"\x01\0\0\0\xc0",  # and one whose body is nil
        b"\x03\0\0",
    ],
)
def test_nonsense_ends_its_own_connection_only(echo: Echo, sent: bytes) -> None:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect("\0" + echo.server.address.name)
    stranger.sendall(sent)
    while stranger.recv(100) != b"":
        pass  # it may say that the greeting was refused
    stranger.close()
    connection, answer, _ = connect(echo.server.address, {"name": "me"}, [])
    assert answer == {"hello": "me"}
    connection.close()


AS_NOBODY = """
import os, sys
from distnadam.errors import LaneError
from distnadam.transport.unix_connection import Address, connect
os.setgid(65534); os.setuid(65534)
try:
    connect(Address(sys.argv[1], sys.argv[2]), {"name": "nobody"}, [])
except LaneError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_though_it_knows_name_and_token(echo: Echo) -> None:
    address = echo.server.address
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, address.name, address.token],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "runs as user 0, this one as 65534" in done.stdout, done.stderr
    assert echo.greeted == []


CALLER = """
import os, sys, time
from distnadam.transport.unix_connection import Address, connect
connection, _, _ = connect(Address(sys.argv[1], sys.argv[2]), {"name": "caller"}, [])
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""


def test_a_death_ends_the_connection_though_a_forked_child_lives_on(echo: Echo) -> None:
    address = echo.server.address
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, address.name, address.token],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert caller.stdout is not None
    child = int(caller.stdout.readline())
    assert not echo.ended.acquire(blocking=False)
    caller.kill()
    caller.wait()
    echo.ended.acquire()  # the test's time limit bounds it
    os.kill(child, 0)
    os.kill(child, signal.SIGKILL)
    caller.stdout.close()
