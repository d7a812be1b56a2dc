"""What a supervisor may rely on of every process manager: the simulation's, and Ray's."""

import os
import secrets
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from distnadam.config import Options
from distnadam.errors import ClusterError, IllegalMessage, ShardLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Describe, Pause, Read, Resume, ShardSpec
from distnadam.protocol.supervisor_messages import (
    AttachStandby,
    DescribeStandby,
    Load,
    Reconfigure,
)
from distnadam.supervision.process_manager import Move, ProcessManager, ShardProcess
from distnadam.tensors.arrays import STATE_ARRAYS, cut_flat
from distnadam.tensors.layout import Layout
from tests.simulation.world import World, WorldProcesses

SIZE = 5000
LAYOUT = Layout.of({"w": np.ones(SIZE, np.float32)})
PARAMS = {"float32": np.linspace(-1, 1, SIZE, dtype=np.float32)}
OPTIONS = Options(kernel="numpy", shard_timeout_s=4.0)
ANSWER_S = 30.0


def specs(num_shards: int, run_id: str = "") -> list[ShardSpec]:
    return [
        ShardSpec(
            index=index,
            num_shards=num_shards,
            num_workers=1,
            replicas=1,
            name=None,
            config=NadamConfig(),
            options=OPTIONS,
            layout=LAYOUT,
            ranges=ranges,
            run_id=run_id,
        )
        for index, ranges in enumerate(LAYOUT.cuts(num_shards))
    ]


class Cluster(ABC):
    """A process manager, and what is needed to see whether it keeps its word."""

    manager: ProcessManager
    run_id = ""

    def __init__(self) -> None:
        self._started: list[ShardProcess] = []

    @abstractmethod
    def kill(self, process: ShardProcess) -> None:
        """Have a process die by itself."""

    @abstractmethod
    def all_deaths(self) -> list[ShardProcess]:
        """Return the ends of watched processes that were reported."""

    def deaths(self) -> list[ShardProcess]:
        """Return those of this test's processes."""
        return [process for process in self.all_deaths() if process in self._started]

    @abstractmethod
    def close(self) -> None:
        """End everything."""

    def start(self, num_shards: int) -> list[ShardProcess]:
        """Start shards that hold their ranges of `PARAMS`."""
        shards: list[ShardProcess] = []
        for spec in specs(num_shards, self.run_id):
            shards.append(self.start_one(spec, near=shards))
        loads = {
            spec.index: Load(epoch=1, params=cut_flat(PARAMS, spec.ranges))
            for spec in specs(num_shards)
        }
        assert self.ask(shards, loads) == dict.fromkeys(range(num_shards), 0)
        return shards

    def start_one(
        self, spec: ShardSpec, *, near: Sequence[ShardProcess], standby: bool = False
    ) -> ShardProcess:
        """Start a process that `end_test` terminates."""
        process = self.manager.start(spec, standby=standby, near=near)
        self._started.append(process)
        return process

    def end_test(self) -> None:
        """Terminate what a test started."""
        self.manager.terminate(*self._started)
        self._started = []

    def ask(self, shards: Sequence[ShardProcess], messages: Mapping[int, Any]) -> dict[int, Any]:
        """Send some of the shards their messages; return the answers."""
        return self.manager.ask(dict(enumerate(shards)), messages, ANSWER_S)

    def ask_one(self, process: ShardProcess, message: Any) -> Any:
        """Send a process a message; return its answer."""
        return self.manager.ask({7: process}, {7: message}, ANSWER_S)[7]


class SimulatedCluster(Cluster):
    def __init__(self) -> None:
        super().__init__()
        self._deaths: list[ShardProcess] = []
        world = World(specs(1), replicas=0)
        self.manager = world.processes = WorldProcesses(world, self._deaths.append)

    @override
    def kill(self, process: ShardProcess) -> None:
        process.handle.kill()

    @override
    def all_deaths(self) -> list[ShardProcess]:
        return list(self._deaths)

    @override
    def close(self) -> None:
        pass


class RemoteManager(ProcessManager):
    """A `RayProcessManager` in an actor of its own, with which its threads end."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def _call(self, method: str, *args: Any, **how: Any) -> Any:
        from distnadam.backends.ray.calls import retry_until_answered

        return retry_until_answered(
            lambda: self._actor.call.remote(method, args, how), timeout_s=2 * ANSWER_S
        )

    @override
    def start(
        self,
        spec: ShardSpec,
        *,
        standby: bool,
        near: Sequence[ShardProcess],
        beside: ShardProcess | None = None,
    ) -> ShardProcess:
        process: ShardProcess = self._call("start", spec, standby=standby, near=list(near))
        return process

    @override
    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        process: ShardProcess = self._call("promote", standby, reconfigure, near=list(near))
        return process

    @override
    def fence(self, process: ShardProcess) -> None:
        self._call("fence", process)

    @override
    def terminate(self, *processes: ShardProcess) -> None:
        self._call("terminate", *processes)

    @override
    def watch(self, process: ShardProcess) -> None:
        self._call("watch", process)

    @override
    def control_state(self, process: ShardProcess) -> Any:
        return self._call("control_state", process)

    @override
    def move(self, move: Move) -> list[Exception]:
        errors: list[Exception] = self._call("move", move)
        return errors

    @override
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        answers: dict[int, Any] = self._call("ask", dict(targets), dict(messages), timeout_s)
        return answers


class Leases:
    """What shards ask of their supervisor's actor: every lease is renewed."""

    def lease(self, who: str, lost: Any) -> bool:
        return True

    def notify(self, report: Any) -> None:
        pass


class ManagerActor:
    """Holds a `RayProcessManager`."""

    def __init__(self, leases: Any, run_id: str) -> None:
        from distnadam.backends.ray.actors import kill_on, make_relay, make_shard, start_time_on
        from distnadam.backends.ray.cordon import Cordon
        from distnadam.backends.ray.process_manager import ActorFactory, RayProcessManager

        self._deaths: list[ShardProcess] = []
        factory = ActorFactory(make_shard, make_relay, kill_on, start_time_on)
        died, cordon = self._deaths.append, Cordon({}, {})
        self._manager = RayProcessManager(leases, run_id, factory, died, 1.0, cordon)

    def call(self, method: str, args: Sequence[Any], how: Mapping[str, Any]) -> Any:
        """Call one of the manager's methods."""
        return getattr(self._manager, method)(*args, **how)

    def deaths(self) -> list[ShardProcess]:
        """Return the watched processes that ended."""
        return list(self._deaths)


class RayCluster(Cluster):
    def __init__(self) -> None:
        import ray

        super().__init__()
        self.run_id = f"contract/{secrets.token_hex(4)}"
        self._leases = ray.remote(Leases).options(num_cpus=0, max_concurrency=4).remote()
        actor = ray.remote(ManagerActor).options(num_cpus=0, max_concurrency=4)
        self._actor = actor.remote(self._leases, self.run_id)
        self.manager = RemoteManager(self._actor)

    @override
    def kill(self, process: ShardProcess) -> None:
        os.kill(process.address.pid, signal.SIGKILL)

    @override
    def all_deaths(self) -> list[ShardProcess]:
        import ray

        deaths: list[ShardProcess] = ray.get(self._actor.deaths.remote())
        return deaths

    @override
    def close(self) -> None:
        from distnadam.backends.ray import registry
        from distnadam.backends.ray.actors import kill_on
        from distnadam.backends.ray.processes import kill_actor

        kill_actor(self._actor)
        kill_actor(self._leases)
        registry.kill_all(self.run_id, kill_on)


@pytest.fixture(scope="module", params=["simulation", "ray"])
def manager(request: pytest.FixtureRequest, one_process: None) -> Iterator[Cluster]:
    """Each process manager in turn, for all tests."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    cluster: Cluster = RayCluster() if request.param == "ray" else SimulatedCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(manager: Cluster) -> Iterator[Cluster]:
    """A process manager without the processes of another test."""
    yield manager
    manager.end_test()


def await_death(cluster: Cluster, process: ShardProcess) -> None:
    deadline = time.monotonic() + ANSWER_S
    while process.index not in [each.index for each in cluster.deaths()]:
        assert time.monotonic() < deadline, "the end of a watched process was not reported"


def test_shards_answer_until_they_are_terminated_and_refusals_are_answers(
    cluster: Cluster,
) -> None:
    shards = cluster.start(2)
    answers = cluster.ask(shards, {0: Describe(), 1: Read("nobody", STATE_ARRAYS), 5: Describe()})
    assert answers.keys() == {0, 1}, "a message without a target is left out"
    assert (answers[0].epoch, answers[0].round) == (1, 0)
    assert isinstance(answers[1], IllegalMessage)
    cluster.manager.terminate(*shards)
    answers = cluster.ask(shards, {0: Describe(), 1: Describe()})
    assert [type(answer) for answer in answers.values()] == [ShardLost, ShardLost]
    cluster.manager.terminate(*shards)


def test_a_process_that_dies_is_reported_and_answers_shard_lost(cluster: Cluster) -> None:
    shards = cluster.start(2)
    for process in shards:
        cluster.manager.watch(process)
    assert cluster.deaths() == []
    cluster.kill(shards[1])
    await_death(cluster, shards[1])
    assert len(cluster.deaths()) >= 1
    assert isinstance(cluster.ask_one(shards[1], Describe()), ShardLost)
    assert cluster.ask_one(shards[0], Describe()).round == 0
    with pytest.raises(ClusterError):
        cluster.manager.control_state(shards[1])


@pytest.mark.on_ray(slow=["ray"])
def test_a_shard_that_a_successor_did_not_find_answers_shard_lost(cluster: Cluster) -> None:
    (found,) = cluster.start(1)
    missing = ShardProcess(1, None, None)
    answers = cluster.ask([found, missing], {0: Describe(), 1: Describe()})
    assert answers[0].round == 0
    assert isinstance(answers[1], ShardLost)
    assert str(answers[1]) == "shard 1: is missing"


@pytest.mark.on_ray("ray-False")
@pytest.mark.parametrize("dead", [False, True])
def test_a_fenced_process_answers_nobody_and_may_be_fenced_again(
    cluster: Cluster, dead: bool
) -> None:
    (process,) = cluster.start(1)
    if dead:
        cluster.kill(process)
    for _ in range(2):
        cluster.manager.fence(process)
        assert isinstance(cluster.ask_one(process, Describe()), ShardLost)


def test_a_filled_standby_takes_over_where_its_fenced_primary_stood(cluster: Cluster) -> None:
    (primary,) = cluster.start(1)
    (spec,) = specs(1, cluster.run_id)
    standby = cluster.start_one(spec, near=[primary], standby=True)
    assert cluster.ask_one(standby, DescribeStandby()) is None
    assert cluster.ask_one(primary, AttachStandby(standby)) == 0
    assert cluster.ask_one(standby, DescribeStandby()) == 0
    cluster.manager.fence(primary)
    assert cluster.ask_one(standby, DescribeStandby()) == 0
    reconfigure = Reconfigure(epoch=5, schedule=())
    promoted = cluster.manager.promote(standby, reconfigure, near=[])
    described = cluster.ask_one(promoted, Describe())
    assert (described.epoch, described.round) == (5, 0)
    assert cluster.ask_one(promoted, Pause("me")).epoch == 5
    read = cluster.ask_one(promoted, Read("me", ("params",)))
    assert read["params"]["float32"].tobytes() == PARAMS["float32"].tobytes()


@pytest.mark.on_ray(slow=["ray"])
def test_a_standby_that_is_empty_or_dead_cannot_take_over(cluster: Cluster) -> None:
    (primary,) = cluster.start(1)
    (spec,) = specs(1, cluster.run_id)
    standby = cluster.start_one(spec, near=[primary], standby=True)
    reconfigure = Reconfigure(epoch=5, schedule=())
    with pytest.raises((ClusterError, IllegalMessage)):
        cluster.manager.promote(standby, reconfigure, near=[])
    cluster.kill(standby)
    with pytest.raises(ClusterError):
        cluster.manager.promote(standby, reconfigure, near=[])


def test_new_shards_load_what_paused_ones_hold(cluster: Cluster) -> None:
    old = cluster.start(2)
    new = [cluster.start_one(spec, near=old) for spec in specs(3, cluster.run_id)]
    for index in range(2):
        cluster.ask_one(old[index], Pause("move"))
    assert cluster.manager.control_state(old[0]).epoch == 1
    move = Move(
        token="move",
        old=old,
        new=new,
        old_cuts=LAYOUT.cuts(2),
        new_cuts=LAYOUT.cuts(3),
        load=Load(epoch=2),
    )
    assert cluster.manager.move(move) == []
    for process, ranges in zip(new, LAYOUT.cuts(3), strict=True):
        assert cluster.ask_one(process, Pause("me")).epoch == 2
        params = cluster.ask_one(process, Read("me", ("params",)))["params"]["float32"]
        assert params.tobytes() == cut_flat(PARAMS, ranges)["float32"].tobytes()
    cluster.ask_one(old[0], Resume("move"))
    again = cluster.manager.move(move)
    assert again and all(isinstance(error, Exception) for error in again), "it is not paused"
