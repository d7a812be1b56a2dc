"""What every replication stream does: the simulation's, by shared memory, TCP and Ray objects."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import ReplicatedRound, ShardControlState
from distnadam.runtime.standby import Standby
from distnadam.tensors.layout import Layout, sizes_of
from distnadam.transport.replication import ReplicationStream
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_replication import ShmReplicationStream, StandbyReceiver
from distnadam.transport.state_memory import reserve_state
from distnadam.transport.tcp_replication import TcpReplicationStream, TcpStandbyReceiver
from tests.simulation.stream import InProcessStream

SIZE = 1000
LAYOUT = Layout.of({"w": np.ones(SIZE, np.float32)})
CONFIG = NadamConfig(use_ema=True, ema_overwrite_frequency=2)
SPEC = ShardSpec(
    index=0,
    num_shards=1,
    num_workers=1,
    replicas=1,
    name=None,
    config=CONFIG,
    options=Options(kernel="numpy"),
    layout=LAYOUT,
    ranges=LAYOUT.cuts(1)[0],
)
STATE = {
    name: {"float32": np.full(SIZE, value, np.float32)}
    for name, value in zip(CONFIG.state_arrays, (1.0, 0.5, 0.25, 0.75), strict=True)
}
PATIENCE_S = 30.0


def control_state(number: int) -> ShardControlState:
    return ShardControlState(
        epoch=1,
        round=number,
        skipped=0,
        clock=Clock(),
        lr=0.0,
        active=0,
        outcome="applied",
        rejection=None,
        ledger={"runs": [], "newest": []},
    )


def decided(number: int) -> ReplicatedRound:
    """An applied round, of which every standby here has the same clock."""
    return ReplicatedRound(
        round=number,
        skipped=0,
        outcome="applied",
        rejection=None,
        counted={},
        lr=step_scalars(Clock(), CONFIG).lr,
        active=0,
        clock=Clock(),
    )


class End(ABC):
    """A standby's end, of which each kind of stream has its own."""

    @abstractmethod
    def connect(self, number: int) -> ReplicationStream:
        """Have the standby take the primary's state after that round."""

    @abstractmethod
    def reached(self) -> int | None:
        """Return the round that the standby has."""

    @abstractmethod
    def kill(self) -> None:
        """End the standby's process."""

    def await_reached(self, expected: int | None) -> None:
        """Wait until the standby has that round; what was sent may be on its way."""
        deadline = time.monotonic() + PATIENCE_S
        while (reached := self.reached()) != expected:
            assert time.monotonic() < deadline, f"at round {reached}, expected {expected}"


class InProcessEnd(End):
    def __init__(self) -> None:
        self.standby = Standby(SPEC)
        self.alive = True

    @override
    def connect(self, number: int) -> ReplicationStream:
        return InProcessStream(
            self.standby, control_state(number), CONFIG, STATE, lambda: self.alive
        )

    @override
    def reached(self) -> int | None:
        return self.standby.reached

    @override
    def kill(self) -> None:
        self.alive = False


class ProcessEnd(End):
    """A standby in a process of its own, with a receiver of some kind."""

    def __init__(self, receive: Callable[[Standby], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(receive, other), daemon=True)
        self._process.start()
        other.close()

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    @abstractmethod
    def fill(self, address: Any, number: int) -> ReplicationStream:
        """Have the receiver at that address take the primary's arrays."""

    @override
    def connect(self, number: int) -> ReplicationStream:
        stream = self.fill(self._ask("address"), number)
        self._ask("begin", number)
        return stream

    @override
    def reached(self) -> int | None:
        reached: int | None = self._ask("reached")
        return reached

    @override
    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


class ShmEnd(ProcessEnd):
    def __init__(self) -> None:
        super().__init__(receive_by_shared_memory)

    @override
    def fill(self, address: Any, number: int) -> ReplicationStream:
        parameters = Arena.create(LAYOUT.sizes, copies=2)
        return ShmReplicationStream(address, reserve_state(SPEC), parameters, number, PATIENCE_S)


class TcpEnd(ProcessEnd):
    def __init__(self) -> None:
        super().__init__(receive_by_tcp)

    @override
    def fill(self, address: Any, number: int) -> ReplicationStream:
        return TcpReplicationStream(0, address, STATE, number, PATIENCE_S)


def receive_by_shared_memory(standby: Standby) -> Any:
    return StandbyReceiver(SPEC, standby.map_states, standby.apply).address


def receive_by_tcp(standby: Standby) -> Any:
    receiver = TcpStandbyReceiver(
        0,
        sizes_of(SPEC.ranges),
        SPEC.config.state_arrays,
        standby.take_arrays,
        standby.apply,
        "127.0.0.1",
        None,
    )
    return receiver.endpoint


def serve(receive: Callable[[Standby], Any], pipe: Any) -> None:
    """Be a standby's process: answer questions until the pipe is closed."""
    standby = Standby(SPEC)
    address = receive(standby)
    with contextlib.suppress(EOFError):
        while True:
            question, *rest = pipe.recv()
            if question == "begin":
                standby.begin(control_state(*rest), CONFIG)
            pipe.send(address if question == "address" else standby.reached)


class ObjectEnd(End):
    """A standby as it lives in a Ray actor."""

    def __init__(self) -> None:
        import ray

        from distnadam.backends.ray.shard_actor import ShardActor

        self._get = ray.get
        self.actor = ray.remote(ShardActor).options(num_cpus=0).remote(SPEC, None)
        self.pid = ray.get(self.actor.open.remote(None, standby=True)).pid

    @override
    def connect(self, number: int) -> ReplicationStream:
        from distnadam.backends.ray.object_replication import ObjectReplicationStream

        return ObjectReplicationStream(self.actor, control_state(number), CONFIG, STATE, PATIENCE_S)

    @override
    def reached(self) -> int | None:
        reached: int | None = self._get(self.actor.reached.remote())
        return reached

    @override
    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def send(stream: ReplicationStream, number: int) -> bool:
    """Write a mean and send its round."""
    if stream.mean is not None:
        stream.mean["float32"][:] = number
    return stream.send(decided(number))


@pytest.fixture(params=["in process", "shared memory", "tcp", "objects"])
def end(request: pytest.FixtureRequest) -> Iterator[End]:
    if request.param == "objects":
        request.getfixturevalue("ray_cluster")
    kinds: dict[str, Callable[[], End]] = {
        "in process": InProcessEnd,
        "shared memory": ShmEnd,
        "tcp": TcpEnd,
        "objects": ObjectEnd,
    }
    end = kinds[request.param]()
    yield end
    end.kill()


def test_a_standby_follows_round_by_round(end: End) -> None:
    stream = end.connect(4)
    assert stream.reached == end.reached() == 4, "rounds go on once it has the state"
    for number in (5, 6, 7):
        assert stream.ready()
        assert send(stream, number)
        assert stream.reached == number
        end.await_reached(number)
    assert stream.ready()
    assert stream.reached == 7
    stream.close()


def test_a_standby_whose_stream_was_closed_has_no_state_any_more(end: End) -> None:
    stream = end.connect(4)
    end.await_reached(4)
    stream.close()
    end.await_reached(None)


def test_a_standby_that_misses_a_round_has_no_state_and_its_primary_learns_it(end: End) -> None:
    stream = end.connect(4)
    end.await_reached(4)
    assert stream.ready()
    learned = not send(stream, 9)
    end.await_reached(None)
    assert learned or not (stream.ready() and send(stream, 10))
    stream.close()


def test_a_primary_learns_that_its_standby_died(end: End) -> None:
    stream = end.connect(4)
    end.await_reached(4)
    end.kill()
    deadline = time.monotonic() + PATIENCE_S
    for number in itertools.count(5):
        if not (stream.ready() and send(stream, number)):
            break
        assert stream.reached == 4, "a round counts once the standby has it"
        assert time.monotonic() < deadline, "the primary never learned it"
    stream.close()


def test_a_standby_can_be_filled_again(end: End) -> None:
    for number in (4, 9):
        stream = end.connect(number)
        end.await_reached(number)
        assert stream.ready()
        assert send(stream, number + 1)
        end.await_reached(number + 1)
        stream.close()
        end.await_reached(None)
