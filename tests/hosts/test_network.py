"""The faults of links and connections do what their names say."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.network import Host, Network, why_not

pytestmark = pytest.mark.slow

PORT = 21007
NUMBERS = 3000


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts without any Ray."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Network(tmp_path) as network:
        yield network.add_host(), network.add_host()


def begin(host: Host, program: str, *args: object) -> "subprocess.Popen[str]":
    command = host.command(sys.executable, "-c", program, *map(str, args))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)  # type: ignore[call-overload,no-any-return]


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


RECEIVE = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
sock.bind(("", int(sys.argv[1])))
print("ready", flush=True)
numbers = []
sock.settimeout(60.0)
while (number := int(sock.recv(100).split()[0])) >= 0:
    numbers.append(number)
print(len(numbers), sum(b < a for a, b in zip(numbers, numbers[1:])), flush=True)
"""
SEND = """
import os, socket, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # each has a queue of its own
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(int(sys.argv[3])):
    sock.sendto(b"%d " % number + bytes(400), (sys.argv[1], int(sys.argv[2])))
    if number % 10 == 0:
        time.sleep(0.001)
time.sleep(0.5)
for _ in range(100):
    sock.sendto(b"-1 ", (sys.argv[1], int(sys.argv[2])))
"""


def test_packets_are_lost_and_overtaken_and_none_once_the_link_is_whole(
    pair: tuple[Host, Host],
) -> None:
    one, other = pair
    # asked for the other's link address now, since few packets wait for one whose answer is lost
    begin(one, SEND, other.address, PORT, 0).communicate()
    for lost, late in (0.05, 0.1), (0.0, 0.0):
        if lost:
            one.lose_and_reorder(lost=lost, late=late)
        else:
            one.unshape()
        receiver = begin(other, RECEIVE, PORT)
        assert line(receiver) == "ready"
        begin(one, SEND, other.address, PORT, NUMBERS).communicate()
        arrived, overtaken = map(int, line(receiver).split())
        receiver.communicate()
        if lost:
            assert 0.5 * lost < 1 - arrived / NUMBERS < 0.5, arrived
            assert overtaken > NUMBERS / 200, overtaken
        else:
            assert (arrived, overtaken) == (NUMBERS, 0)


LISTEN = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
sock, _ = server.accept()
print("accepted", flush=True)
try:
    print(len(sock.recv(1)), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""
CONNECT = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
try:
    print(len(sock.recv(1)), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize("at_the_listener", [True, False])
def test_a_hosts_connections_of_a_range_of_ports_are_found_and_reset(
    at_the_listener: bool, pair: tuple[Host, Host]
) -> None:
    one, other = pair
    listener = begin(one, LISTEN, PORT)
    assert line(listener) == "ready"
    assert (one.listening(PORT - 7, PORT), one.listening(PORT + 1, PORT + 7)) == ([PORT], [])
    caller = begin(other, CONNECT, one.address, PORT)
    assert line(listener) == "accepted"
    host = one if at_the_listener else other
    host.reset(PORT + 1, PORT + 7)  # others are left alone
    assert len(host.listening(PORT, PORT)) == (1 if host is one else 0)
    host.reset(PORT, PORT + 7)
    ends = {line(listener), line(caller)}
    assert ends <= {"ConnectionResetError", "ConnectionAbortedError"}, ends
    for each in (listener, caller):
        each.communicate()
