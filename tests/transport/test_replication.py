"""A standby followed over real sockets and shared memory, through the real death of its primary's
process.
"""

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from distnadam.errors import LaneError
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.codec import pack_record, unpack_record
from distnadam.protocol.messages import PushNote
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Reconfigure,
    Record,
    ReplicatedJoin,
    ReplicatedRound,
)
from distnadam.tensors.arrays import Flat
from distnadam.transport.connection import Address
from distnadam.transport.replication import ShmReplicationStream, StandbyReceiver

SIZES = {"float32": 1000}
ARRAYS = {
    name: {"float32": np.full(1000, value, np.float32)}
    for name, value in (("params", 1), ("m", 2), ("v", 3))
}


def decided(number: int) -> ReplicatedRound:
    counted = {
        0: PushNote(incarnation=1, round=number, dtypes={"float32": "float16"}),
        2: PushNote(incarnation=7, round=number, dtypes=None, rejection="NaN"),
    }
    return ReplicatedRound(
        round=number,
        skipped=0,
        outcome="applied",
        rejection=None,
        counted=counted,
        lr=0.002,
        active=number % 2,
        clock=Clock(number, 0.9),
    )


class Followed:
    """A follower, and what came: records, each with the mean that lay in memory then."""

    def __init__(self) -> None:
        self.begun: dict[str, Flat] = {}
        self.came: list[tuple[Record, float]] = []
        self.hang = threading.Event()
        self.hang.set()
        self.follower = StandbyReceiver(SIZES, self.begun.update, self._apply)

    def _apply(self, record: Record, mean: Flat) -> None:
        self.hang.wait()
        if isinstance(record, ReplicatedRound) and record.round == 13:
            raise ValueError("it cannot be followed")
        self.came.append((record, float(mean["float32"][-1])))


@pytest.fixture
def followed() -> Any:
    followed = Followed()
    yield followed
    followed.hang.set()
    followed.follower.close()


def test_it_gets_a_copy_of_the_arrays_and_each_rounds_mean_with_its_record(
    followed: Followed,
) -> None:
    replica = ShmReplicationStream(followed.follower.address, ARRAYS, 4, 10.0)
    assert {name: flat["float32"].tobytes() for name, flat in followed.begun.items()} == {
        name: flat["float32"].tobytes() for name, flat in ARRAYS.items()
    }
    for number in (5, 6, 7):
        assert replica.ready()
        replica.mean["float32"][:] = number
        assert replica.send(decided(number))
    assert replica.ready() and replica.reached == 7
    assert followed.came == [(decided(number), float(number)) for number in (5, 6, 7)]
    replica.close()
    assert followed.follower.ended.wait(10)
    assert followed.came[-1][0] == DetachStandby(), (
        "it was let go, which the end of a process does not say"
    )


def primary_process(address: Address, rounds: int, unannounced: bool) -> None:
    """Be a primary that is killed: after so many records, with a mean half written where
    `unannounced`.
    """
    replica = ShmReplicationStream(address, ARRAYS, 0, 10.0)
    for number in range(1, rounds + 1):
        replica.ready()
        replica.mean["float32"][:] = number
        replica.send(decided(number))
    if unannounced:
        replica.ready()
        replica.mean["float32"][:500] = -1.0
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("rounds", "unannounced"), [(0, False), (0, True), (1, False), (3, False), (3, True)]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_all_that_a_killed_primary_announced_is_there_and_nothing_else(
    followed: Followed, rounds: int, unannounced: bool
) -> None:
    child = os.fork()
    if child == 0:
        primary_process(followed.follower.address, rounds, unannounced)
    os.waitpid(child, 0)
    assert followed.follower.ended.wait(10)
    assert followed.came == [(decided(number), float(number)) for number in range(1, rounds + 1)]


def test_a_follower_that_hangs_is_given_up_before_its_mean_is_overwritten(
    followed: Followed,
) -> None:
    replica = ShmReplicationStream(followed.follower.address, ARRAYS, 0, 0.05)
    followed.hang.clear()
    replica.mean["float32"][:] = 1
    assert replica.send(decided(1))
    assert not replica.ready()
    replica.close()
    followed.hang.set()
    assert followed.follower.ended.wait(10)
    assert [record for record, _ in followed.came] == [decided(1), DetachStandby()], (
        "when it goes on it learns that it is out of date"
    )


def test_a_record_that_cannot_be_followed_ends_the_line_and_the_primary_sees_it(
    followed: Followed,
) -> None:
    replica = ShmReplicationStream(followed.follower.address, ARRAYS, 12, 10.0)
    replica.send(decided(13))
    assert not replica.ready()
    assert followed.follower.ended.wait(10)
    replica.close()


@pytest.mark.parametrize(
    "record",
    [
        decided(3),
        ReplicatedJoin(1, 5),
        Reconfigure(epoch=4, schedule=((1, (0, 1)), (9, (0,))), newest={0: 3}),
        DetachStandby(),
    ],
)
def test_records_travel_whole(record: Record) -> None:
    assert unpack_record(pack_record(record)[4:]) == record


@pytest.mark.parametrize("frame", [b"", b"\x93\x01\x02", b"\x92\xa5round\x01", b"\x92\xa4join\x01"])
def test_what_is_no_record_is_refused(frame: bytes) -> None:
    with pytest.raises(LaneError, match="bytes is no record"):
        unpack_record(frame)
