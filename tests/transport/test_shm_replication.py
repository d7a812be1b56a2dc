"""Replication over real sockets and memory, through the real death of a primary's process."""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from distnadam.config import Options
from distnadam.errors import LaneError
from distnadam.groups import Group
from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import LossScale
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.codec import pack_record, unpack_record
from distnadam.protocol.messages import PushNote, ShardSpec
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Reconfigure,
    Record,
    ReplicatedConfig,
    ReplicatedJoin,
    ReplicatedRound,
)
from distnadam.schedules import Polynomial
from distnadam.tensors.arrays import Flat, cut_flat
from distnadam.tensors.layout import Layout, sizes_of
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_replication import ShmReplicationStream, StandbyReceiver
from distnadam.transport.state_memory import copies_in, reserve_state
from distnadam.transport.unix_connection import Address
from tests.eventually import eventually

HALF = {"float32": "bfloat16"}
LAYOUT = Layout.of({"a": np.ones(300, np.float32), "b": np.ones(1000, np.float32)})
SPEC = ShardSpec(
    index=1,
    num_shards=2,
    num_workers=1,
    replicas=1,
    name=None,
    config=NadamConfig(use_ema=True),
    options=Options(kernel="numpy"),
    layout=LAYOUT,
    ranges=LAYOUT.cuts(2)[1],
)
SIZE = sizes_of(SPEC.ranges)["float32"]


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


class Primary:
    """A primary whose arrays are all of one number after each round."""

    def __init__(self, address: Address, decided: int, timeout_s: float = 10.0) -> None:
        arena, parameters = reserve_state(SPEC), Arena.create(LAYOUT.sizes, copies=2)
        self._states = [
            [cut_flat(seen, SPEC.ranges)["float32"], *(flat["float32"] for flat in beside.values())]
            for seen, beside in zip(parameters.flats, copies_in(arena, SPEC), strict=True)
        ]
        self.write(decided)
        self.stream = ShmReplicationStream(address, arena, parameters, decided, timeout_s)

    def write(self, number: int, elements: int = SIZE) -> None:
        """Write the first elements of all arrays of the copy that a round steps into."""
        for array in self._states[number % 2]:
            array[:elements] = number

    def step(self, number: int) -> bool:
        self.write(number)
        return self.stream.send(decided(number))


class RecordingStandby:
    """A follower, and which records came."""

    def __init__(self) -> None:
        self.states: Sequence[dict[str, Flat]] = ()
        self.came: list[Record] = []
        self.hang = threading.Event()
        self.hang.set()
        self.receiver = StandbyReceiver(SPEC, self._begin, self._apply)

    def _begin(self, states: Sequence[dict[str, Flat]]) -> None:
        self.states = states

    def _apply(self, record: Record, mean: Flat | None) -> None:
        assert mean is None
        self.hang.wait()
        if isinstance(record, ReplicatedRound) and record.round == 13:
            raise ValueError("it cannot be applied")
        self.came.append(record)

    def has(self, number: int) -> bool:
        """Whether the copy of a round has its number everywhere, in each array."""
        state = self.states[number % 2]
        assert list(state) == ["params", "m", "v", "ema"]
        return all(flat["float32"].tolist() == [number] * SIZE for flat in state.values())


@pytest.fixture
def standby() -> Any:
    standby = RecordingStandby()
    yield standby
    standby.hang.set()
    standby.receiver.close()


def test_it_maps_the_arrays_and_gets_each_rounds_record(standby: RecordingStandby) -> None:
    primary = Primary(standby.receiver.address, 19)
    assert standby.has(19)
    assert not any(flat["float32"].flags.writeable for flat in standby.states[0].values())
    numbers = range(20, 75)  # more than may be on their way
    for number in numbers:
        assert primary.stream.ready()
        assert primary.step(number)
        assert standby.has(number)
    assert primary.stream.reached == numbers[-1]
    eventually(lambda: len(standby.came) == len(numbers))
    assert standby.came == [decided(number) for number in numbers]
    primary.stream.close()
    assert standby.receiver.ended.wait(10)
    assert standby.came[-1] == DetachStandby(), (
        "it was detached, which the end of a process does not say"
    )


def primary_process(address: Address, rounds: int, unannounced: bool) -> None:
    """Be a primary that is killed: after so many records, with a step half done where
    `unannounced`.
    """
    primary = Primary(address, 0)
    for number in range(1, rounds + 1):
        primary.stream.ready()
        primary.step(number)
    if unannounced:
        primary.stream.ready()
        primary.write(rounds + 1, SIZE // 2)
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
    assert standby.came == [decided(number) for number in range(1, rounds + 1)]
    assert standby.has(rounds)


def test_a_follower_that_hangs_is_given_up_before_its_socket_is_full(
    standby: RecordingStandby,
) -> None:
    primary = Primary(standby.receiver.address, 19, 0.05)
    standby.hang.clear()
    number = 19
    while primary.stream.ready():
        number += 1
        assert primary.step(number)
    assert number > 20
    primary.stream.close()
    standby.hang.set()
    assert standby.receiver.ended.wait(10)
    assert standby.came[:-1] == [decided(n) for n in range(20, number + 1)]
    assert standby.came[-1] == DetachStandby(), "when it goes on it learns that it is out of date"


def test_a_record_that_cannot_be_applied_ends_the_connection(
    standby: RecordingStandby,
) -> None:
    primary = Primary(standby.receiver.address, 12)
    assert primary.step(13)
    assert standby.receiver.ended.wait(10)
    assert not primary.step(14)
    primary.stream.close()


def test_memory_of_another_size_is_refused(standby: RecordingStandby) -> None:
    parameters = Arena.create({"float32": 5000}, copies=2)
    with pytest.raises(LaneError, match="expected 16384 bytes of sealed shared memory"):
        ShmReplicationStream(
            standby.receiver.address, reserve_state(SPEC), parameters, 0, timeout_s=10.0
        )
    assert standby.states == ()
    assert standby.receiver.ended.is_set()


@pytest.mark.parametrize(
    "record",
    [
        decided(3),
        replace(decided(3), counted={}),
        replace(decided(3), counted={2: PushNote(incarnation=7, round=3, dtypes=HALF)}),
        replace(decided(3), counted={2: PushNote(incarnation=7, round=3, dtypes={})}),
        replace(decided(3), outcome="skipped", rejection="NaN"),
        ReplicatedJoin(1, 5),
        ReplicatedConfig(config=NadamConfig(), revision=2),
        ReplicatedConfig(
            config=NadamConfig(
                lr=Polynomial(0.1, 9),
                clipnorm=0.5,
                groups=[Group("a", lr_scale=0.5)],
                loss_scale=LossScale(),
            ),
            revision=3,
        ),
        Reconfigure(epoch=4, schedule=((1, (0, 1)), (9, (0,))), newest={0: 3}),
        DetachStandby(),
    ],
)
def test_records_travel_whole(record: Record) -> None:
    assert unpack_record(pack_record(record)[4:]) == record


A_ROUND = "round", 3, 0, "applied", None, [], 0.1, 1, 3, 0.9, None


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x93\x01\x02",
        b"\x92\xa5round\x01",
        b"\x92\xa4join\x01",
        msgpack.packb(("other", *A_ROUND[1:])),
        msgpack.packb((["round"], *A_ROUND[1:])),
    ],
)
def test_what_is_no_record_is_refused(frame: bytes) -> None:
    with pytest.raises(LaneError, match="bytes is no record"):
        unpack_record(frame)
    assert isinstance(unpack_record(msgpack.packb(A_ROUND)), ReplicatedRound)
