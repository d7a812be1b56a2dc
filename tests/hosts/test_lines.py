"""A connection between two hosts whose link fails: it lives through moments, and is given up in
seconds, by both ends.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import ROOT
from tests.hosts.network import Host, Network, why_not
from tests.hosts.program import Program

pytestmark = pytest.mark.slow

DEAD_LINE_S = 10.0
MUCH = 20_000_000


class Ends:
    """The two ends of a connection, each on a host of its own."""

    def __init__(self, network: Network) -> None:
        self.hosts = network.add_host(), network.add_host()
        self.listens = self._begin(self.hosts[0], "listen", self.hosts[0].address)
        said = self.listens.first("port")
        self.dials = self._begin(
            self.hosts[1], "dial", self.hosts[0].address, said["port"], said["secret"]
        )
        self.dials.first("ready")

    def _begin(self, host: Host, *args: object) -> Program:
        command = host.command(sys.executable, "-m", "tests.hosts.ends", *map(str, args))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return Program(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))  # type: ignore[call-overload]

    def send(self, num_bytes: int) -> None:
        self.dials.tell(str(num_bytes))

    def arrived(self) -> list[int]:
        return [event["arrived"] for event in self.listens.events if "arrived" in event]

    def have_ended(self) -> bool:
        return any("ended" in event for end in (self.listens, self.dials) for event in end.events)

    def close(self) -> None:
        for end in (self.dials, self.listens):
            end.close()


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Network(tmp_path) as network:
        ends = Ends(network)
        ends.send(7)
        ends.dials.first("arrived")
        yield ends
        ends.close()


@pytest.mark.parametrize(
    ("how", "is_sending"),
    [
        ("cut", False),
        ("silence", True),
        ("deafen", True),
        pytest.param("cut", True, marks=pytest.mark.nightly),
        pytest.param("silence", False, marks=pytest.mark.nightly),
        pytest.param("deafen", False, marks=pytest.mark.nightly),
    ],
)
def test_a_dead_line_is_given_up_by_both_ends_in_seconds(
    how: str, is_sending: bool, ends: Ends
) -> None:
    """Where nothing is sent, the kernel's probes find it out."""
    host = ends.hosts[1]
    if is_sending:
        host.shape(8e6)
        ends.send(MUCH)
        time.sleep(1.0)
    began = time.monotonic()
    getattr(host, how)()
    for end in (ends.listens, ends.dials):
        end.first("ended")
    assert time.monotonic() - began < 2 * DEAD_LINE_S + 2
    assert ends.arrived() == [7], "half a message counts as none"


def test_a_link_that_drops_for_moments_ends_no_line_and_loses_nothing(ends: Ends) -> None:
    host = ends.hosts[1]
    host.shape(40e6)
    ends.send(MUCH)
    for _ in range(4):
        host.cut()
        time.sleep(0.3)
        host.mend()
        time.sleep(0.3)
    host.lose_and_reorder(lost=0.02, late=0.1)
    time.sleep(1.0)
    host.unshape()
    ends.send(8)
    ends.listens.first("arrived", lambda num_bytes: num_bytes == 8)
    assert ends.arrived() == [7, MUCH, 8]
    assert not ends.have_ended()


def test_a_connection_that_is_reset_in_the_middle_ends_at_once_for_both(ends: Ends) -> None:
    host = ends.hosts[1]
    host.shape(8e6)
    ends.send(MUCH)
    time.sleep(1.0)
    began = time.monotonic()
    host.reset(1, 65535)
    for end in (ends.listens, ends.dials):
        end.first("ended")
    assert time.monotonic() - began < 5.0
    assert ends.arrived() == [7]


def test_a_link_that_is_full_or_slow_ends_no_line(ends: Ends) -> None:
    """It moves for longer than a dead line's time."""
    ends.hosts[1].shape(1e6, burst_bytes=16_000)
    began = time.monotonic()
    ends.send(2_000_000)
    ends.send(9)
    ends.dials.first("arrived", lambda num_bytes: num_bytes == 0, also="time")
    ends.listens.first("arrived", lambda num_bytes: num_bytes == 9)
    assert time.monotonic() - began > DEAD_LINE_S
    assert not ends.have_ended()
