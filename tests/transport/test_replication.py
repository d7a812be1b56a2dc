"""Replication over real sockets and memory, through the real death of a primary's process."""

import os
import signal
import threading
from dataclasses import replace
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
    ReplicatedSave,
)
from distnadam.tensors.arrays import STATE_ARRAYS, Flat
from distnadam.transport.connection import Address
from distnadam.transport.replication import ShmReplicationStream, StandbyReceiver
from tests.eventually import eventually

HALF = {"float32": "bfloat16"}
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


class RecordingStandby:
    """A follower, and what came: records, each with the mean that lay in memory then."""

    def __init__(self) -> None:
        self.begun: dict[str, Flat] = {}
        self.came: list[tuple[Record, float]] = []
        self.hang = threading.Event()
        self.hang.set()
        self.receiver = StandbyReceiver(SIZES, STATE_ARRAYS, self.begun.update, self._apply)

    def _apply(self, record: Record, mean: Flat) -> None:
        self.hang.wait()
        if isinstance(record, ReplicatedRound) and record.round == 13:
            raise ValueError("it cannot be applied")
        self.came.append((record, float(mean["float32"][-1])))


@pytest.fixture
def standby() -> Any:
    standby = RecordingStandby()
    yield standby
    standby.hang.set()
    standby.receiver.close()


def test_it_gets_a_copy_of_the_arrays_and_each_rounds_mean_with_its_record(
    standby: RecordingStandby,
) -> None:
    stream = ShmReplicationStream(standby.receiver.address, ARRAYS, 19, 10.0)
    assert {name: flat["float32"].tobytes() for name, flat in standby.begun.items()} == {
        name: flat["float32"].tobytes() for name, flat in ARRAYS.items()
    }
    numbers = range(20, 75)  # more than there are places for means
    for number in numbers:
        assert stream.ready()
        stream.mean["float32"][:] = number
        assert stream.send(decided(number))
    assert stream.reached == numbers[-1]
    eventually(lambda: len(standby.came) == len(numbers))
    assert standby.came == [(decided(number), float(number)) for number in numbers]
    stream.close()
    assert standby.receiver.ended.wait(10)
    assert standby.came[-1][0] == DetachStandby(), (
        "it was detached, which the end of a process does not say"
    )


def primary_process(address: Address, rounds: int, unannounced: bool) -> None:
    """Be a primary that is killed: after so many records, with a mean half written where
    `unannounced`.
    """
    stream = ShmReplicationStream(address, ARRAYS, 0, 10.0)
    for number in range(1, rounds + 1):
        stream.ready()
        stream.mean["float32"][:] = number
        stream.send(decided(number))
    if unannounced:
        stream.ready()
        stream.mean["float32"][:500] = -1.0
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("rounds", "unannounced"), [(0, False), (0, True), (1, False), (3, False), (3, True)]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_all_that_a_killed_primary_announced_is_there_and_nothing_else(
    standby: RecordingStandby, rounds: int, unannounced: bool
) -> None:
    child = os.fork()
    if child == 0:
        primary_process(standby.receiver.address, rounds, unannounced)
    os.waitpid(child, 0)
    assert standby.receiver.ended.wait(10)
    assert standby.came == [(decided(number), float(number)) for number in range(1, rounds + 1)]


def test_a_follower_that_hangs_is_given_up_before_its_mean_is_overwritten(
    standby: RecordingStandby,
) -> None:
    stream = ShmReplicationStream(standby.receiver.address, ARRAYS, 19, 0.05)
    standby.hang.clear()
    number = 19
    while stream.ready():
        number += 1
        stream.mean["float32"][:] = number
        assert stream.send(decided(number))
    assert number > 20
    stream.close()
    standby.hang.set()
    assert standby.receiver.ended.wait(10)
    assert standby.came[:-1] == [(decided(n), float(n)) for n in range(20, number + 1)]
    assert standby.came[-1][0] == DetachStandby(), (
        "when it goes on it learns that it is out of date"
    )


def test_a_record_that_cannot_be_applied_ends_the_connection(
    standby: RecordingStandby,
) -> None:
    stream = ShmReplicationStream(standby.receiver.address, ARRAYS, 12, 10.0)
    assert stream.send(decided(13))
    assert standby.receiver.ended.wait(10)
    assert not stream.send(decided(14))
    stream.close()


@pytest.mark.parametrize(
    "record",
    [
        decided(3),
        replace(decided(3), counted={}),
        replace(decided(3), counted={2: PushNote(incarnation=7, round=3, dtypes=HALF)}),
        replace(decided(3), counted={2: PushNote(incarnation=7, round=3, dtypes={})}),
        replace(decided(3), outcome="skipped", rejection="NaN"),
        ReplicatedJoin(1, 5),
        ReplicatedSave(),
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
