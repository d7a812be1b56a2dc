"""The sockets: greetings, large frames, the end of a line at a death whoever was forked, and
strangers refused.
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
from distnadam.transport.connection import Address, Connection, ConnectionServer, connect


class Echo:
    """A server that sends every frame back, and remembers who came and went."""

    def __init__(self) -> None:
        self.greeted: list[Any] = []
        self.ended = threading.Semaphore(0)
        self.server = ConnectionServer(self.greet, self.frame, lambda line: self.ended.release())

    def greet(
        self, line: Connection, greeting: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if greeting["name"] == "unwanted":
            raise LaneError("you are not wanted")
        self.greeted.append(greeting["name"])
        return {"hello": greeting["name"]}, []

    def frame(self, line: Connection, body: bytes) -> None:
        line.send(len(body).to_bytes(4, "little") + body)


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.server.close()
    assert not echo.server._thread.is_alive()


def receive(line: Connection, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        select.select([line], [line] if not line.flush() else [], [])
        frames = line.receive()
        assert frames is not None, "the line ended"
        got += frames
    return got


def test_greetings_are_exchanged_and_frames_come_back_in_order(echo: Echo) -> None:
    line, answer, fds = connect(echo.server.address, {"name": "me"}, [])
    assert (answer, fds) == ({"hello": "me"}, [])
    for number in range(50):
        line.send((1).to_bytes(4, "little") + bytes([number]))
    assert receive(line, 50) == [bytes([number]) for number in range(50)]
    line.close()
    echo.ended.acquire()


def test_frames_larger_than_any_buffer_go_both_ways_and_hold_nobody_up(echo: Echo) -> None:
    line, _, _ = connect(echo.server.address, {"name": "large"}, [])
    other, _, _ = connect(echo.server.address, {"name": "small"}, [])
    body = os.urandom(20 << 20)
    assert not line.send(len(body).to_bytes(4, "little") + body), (
        "it does not fit at once, and does not wait"
    )
    other.send((1).to_bytes(4, "little") + b"x")
    assert receive(other, 1) == [b"x"]
    assert receive(line, 1) == [body]
    line.close()
    other.close()


def test_a_wrong_token_and_a_refused_greeting_say_so(echo: Echo) -> None:
    with pytest.raises(LaneError, match="the token is wrong"):
        connect(Address(echo.server.address.name, "0" * 32), {"name": "me"}, [])
    with pytest.raises(LaneError, match="you are not wanted"):
        connect(echo.server.address, {"name": "unwanted"}, [])
    with pytest.raises(LaneError, match="no lane to the socket distnadam-nowhere"):
        connect(Address("distnadam-nowhere", ""), {}, [])
    assert echo.greeted == []


def test_nonsense_ends_its_own_line_only(echo: Echo) -> None:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect("\0" + echo.server.address.name)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert stranger.recv(100) == b""
    stranger.close()
    line, answer, _ = connect(echo.server.address, {"name": "me"}, [])
    assert answer == {"hello": "me"}
    line.close()


AS_NOBODY = """
import os, sys
from distnadam.errors import LaneError
from distnadam.transport.connection import Address, connect
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
from distnadam.transport.connection import Address, connect
line, _, _ = connect(Address(sys.argv[1], sys.argv[2]), {"name": "caller"}, [])
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""


def test_a_death_ends_the_line_though_a_forked_child_lives_on(echo: Echo) -> None:
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
