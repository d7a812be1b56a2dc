"""Programs on a Ray of two nodes of this machine: workers on the one, shards on the other.

python -m tests.backends.ray.on_two_nodes, with a name of `CASES` in each line of input: each that
holds is named in the output, and the first that does not ends the process.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distnadam import DistNadam, Options
from distnadam.backends.ray.worker_group import RayWorkerGroup
from distnadam.client import push_ahead
from distnadam.client.status import RunningOptimizer
from distnadam.planning import descriptors
from distnadam.protocol.messages import Describe
from tests.backends.ray.test_backend import title_of
from tests.descriptors import CONNECTED, LISTENS, MEMORY, descriptors_of
from tests.eventually import eventually

SIZE = 50_000
PARAMS = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}
STORE = 80 * 2**20


class Trainer:
    def __init__(self, optimizer: DistNadam, rank: int) -> None:
        self._worker = optimizer.worker(rank)
        self._rank = rank

    def step(self, *rounds: int) -> bytes:
        for round in rounds:
            stepped = self._worker.step(gradient(round, self._rank))
        assert not stepped["w"].flags.owndata, "a view of what the relay has brought"
        return self.parameters()

    def push_tensors(self, round: int) -> None:
        push_ahead.BUCKET_BYTES = 1000  # these tensors are small
        for path, values in gradient(round, self._rank).items():
            self._worker.push_tensor(path, values)

    def step_by_tensors(self, *rounds: int) -> bytes:
        for round in rounds:
            self.push_tensors(round)
            self._worker.step()
        return self.parameters()

    def step_pushed(self) -> bytes:
        self._worker.step()
        return self.parameters()

    def parameters(self) -> bytes:
        read: bytes = self._worker.parameters()["w"].tobytes()
        return read

    def pull(self) -> bytes:
        read: bytes = self._worker.pull()["w"].tobytes()
        return read

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._worker.close()


def gradient(round: int, rank: int) -> dict[str, Any]:
    return {"w": np.sin(np.arange(SIZE) + round + 7 * rank).astype(np.float32)}


def right(num_rounds: int) -> bytes:
    """Return the parameters after so many rounds of both ranks."""
    with DistNadam(backend="local").build(PARAMS) as one:
        for round in range(1, num_rounds + 1):
            both = [gradient(round, rank)["w"] for rank in (0, 1)]
            one.apply_gradients({"w": (both[0] + both[1]) / np.float32(2)})
        found: bytes = one.get_params()["w"].tobytes()
        return found


class Two:
    """An optimizer of two shards on the second node, and a worker of each rank on the first."""

    def __init__(self, sum_group: int, name: str | None = None, **options: Any) -> None:
        self.optimizer = DistNadam(
            num_shards=2,
            num_workers=2,
            sum_group=sum_group,
            backend="ray",
            name=name,
            options=Options(shard_resources={"shard": 1}, **options),
        ).build(PARAMS)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        make = ray.remote(num_cpus=0)(Trainer).options(scheduling_strategy=here)
        self.trainers = [make.remote(self.optimizer, rank) for rank in (0, 1)]

    def step(self, *rounds: int) -> None:
        """Step with both ranks, and check what both read."""
        read = ray.get([each.step.remote(*rounds) for each in self.trainers])
        assert read == [right(rounds[-1])] * 2

    def received(self) -> int:
        """The bytes that the shards have got by TCP."""
        shards = self.optimizer.shards
        found = shards.ask(shards.for_all(Describe()))
        return sum(there for each in found.values() for _, there in each.traffic.values())

    def close(self) -> None:
        self.optimizer.close()
        assert relays() == [], "none outlives its optimizer"
        for trainer in self.trainers:
            ray.kill(trainer)


def relays() -> list[int]:
    """The relays of this machine that belong to this program's Ray."""
    return _titled("Relay")


def supervisors() -> list[int]:
    """The supervisors likewise."""
    return _titled("Supervisor")


def _titled(role: str) -> list[int]:
    mine = os.environ["RAY_TMPDIR"]
    return [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if (title := title_of(pid)).startswith("ray::distnadam ")
        and f" {role}" in title
        and mine in _environment(pid)
    ]


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def two_workers_share_one_relay_that_ends_with_the_optimizer(two: Two) -> None:
    two.step(1, 2, 3)
    assert len(relays()) == 1


def a_relay_that_is_killed_or_halted_is_replaced_and_nothing_is_lost(two: Two) -> None:
    two.step(1)
    for round, blow in ((2, signal.SIGKILL), (3, signal.SIGSTOP)):
        (struck,) = relays()
        os.kill(struck, blow)
        two.step(round)
        (successor,) = relays()
        assert successor != struck
    (struck,) = relays()
    os.kill(struck, signal.SIGKILL)
    read = ray.get([each.pull.remote() for each in two.trainers])
    assert read == [right(3)] * 2
    two.step(4, 5)


def a_relay_whose_workers_have_left_ends_and_another_begins_on_demand(two: Two) -> None:
    two.step(1)
    ray.get([each.close.remote() for each in two.trainers])
    eventually(lambda: relays() == [])
    worker = two.optimizer.worker(0)
    assert worker.parameters()["w"].tobytes() == right(1)
    assert len(relays()) == 1
    worker.close()


def what_was_replaced_or_resharded_is_read_by_the_next_pull(two: Two) -> None:
    two.step(1)
    new = {"w": np.arange(SIZE, dtype=np.float32)}
    two.optimizer.set_params(new)
    pulled = ray.get([each.pull.remote() for each in two.trainers])
    assert pulled == [new["w"].tobytes()] * 2
    two.optimizer.set_params(PARAMS)
    two.optimizer.reshard(1)
    assert ray.get([each.pull.remote() for each in two.trainers]) == [PARAMS["w"].tobytes()] * 2


def the_pushes_of_a_group_go_as_one_and_again_where_their_relay_is_killed(two: Two) -> None:
    two.step(1)
    before = two.received()
    two.step(2)
    sent = two.received() - before
    assert 4 * SIZE <= sent <= 1.1 * 4 * SIZE, "once for both ranks"
    (struck,) = relays()
    os.kill(struck, signal.SIGKILL)
    two.step(3, 4)
    assert len(relays()) == 1


def tensors_that_leave_before_their_push_count_once_and_also_where_the_relay_is_killed(
    two: Two,
) -> None:
    two.step(1)
    before = two.received()
    ray.get([each.push_tensors.remote(2) for each in two.trainers])
    eventually(lambda: two.received() - before >= 2 * 4 * SIZE)
    assert ray.get([each.step_pushed.remote() for each in two.trainers]) == [right(2)] * 2
    sent = two.received() - before
    assert 2 * 4 * SIZE <= sent <= 1.1 * 2 * 4 * SIZE
    (struck,) = relays()
    stepping = [each.step_by_tensors.remote(*range(3, 60)) for each in two.trainers]
    time.sleep(0.1)
    os.kill(struck, signal.SIGKILL)
    assert ray.get(stepping) == [right(59)] * 2


def what_lives_on_keeps_nothing_of_shards_that_are_replaced(two: Two) -> None:
    """Relay, workers, supervisor and this process: all that live through a reshard."""
    pids = [os.getpid(), *ray.get([each.pid.remote() for each in two.trainers])]
    counts = []
    for turn in range(3):
        for shards in (1, 2):
            two.optimizer.reshard(shards)
            two.step(2 * turn + shards)
        counts.append([descriptors_of(pid) for pid in (*pids, *relays(), *supervisors())])
    workers_of_relay = [relay[CONNECTED] for *_, relay, _ in counts]
    assert workers_of_relay == [2 * 2] * len(counts), "each by each shard, whenever it began"
    for first, last in zip(counts[0], counts[-1], strict=True):
        assert last[MEMORY] <= first[MEMORY], (first, last)
        assert last.total() <= first.total() + 4, (first, last)  # Ray's own vary


def a_supervisor_under_a_name_keeps_nothing_of_shards_that_are_replaced(two: Two) -> None:
    """Each of these shards watches the supervisor, by a call that this holds."""
    (supervisor,) = supervisors()
    before, turns = descriptors_of(supervisor), 5
    for shards in turns * (1, 2):
        two.optimizer.reshard(shards)
    replaced = 3 * turns  # Ray's own vary, by less than half of one for each
    eventually(lambda: descriptors_of(supervisor).total() < before.total() + replaced / 2)


def no_process_has_more_open_than_is_planned(two: Two) -> None:
    two.step(1, 2)
    bounds = [descriptors.of_shard(2, 2, 0)] * 4 + [descriptors.of_relay(2, 2)]
    processes = [address.pid for address in two.optimizer.shards.backend.addresses]
    processes += ray.get([each.pid.remote() for each in two.trainers])
    for pid, bound in zip([*processes, *relays()], bounds, strict=True):
        counts = descriptors_of(pid)
        assert counts.total() <= bound, (counts, bound)
    ours = counts[MEMORY] + counts[CONNECTED] + counts[LISTENS]  # of the relay
    assert 3 * 2 * 2 < ours <= descriptors.of_relay(2, 2) - descriptors.of_relay(0, 0)


class Placed:
    def __init__(self, rank: int) -> None:
        self._node = ray.get_runtime_context().get_node_id()

    def node(self) -> str:
        return self._node


def ranks_of_a_group_are_placed_on_one_node_and_the_groups_in_turn(two: Two) -> None:
    group = RayWorkerGroup(4, Placed, Options(), together=2)
    for rank in range(4):
        group.call(rank, "node")
    nodes: dict[int, str] = {}
    while len(nodes) < 4:
        nodes |= dict(group.results(60.0))
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    group.close()


def status_shows_what_goes_between_hosts_and_what_a_step_waits_for(two: Two) -> None:
    backend = two.optimizer.shards.backend
    running = RunningOptimizer(backend, backend.supervisor.specs()[0])
    before = running.status()
    two.step(1, 2, 3)
    now = running.status(before)
    moved = sum(now.moved.values()) - sum(before.moved.values())
    least = 3 * (2 + 1) * PARAMS["w"].nbytes  # each worker's gradients, parameters once
    assert least <= moved < 1.2 * least, (least, moved)
    (host,) = now.hosts  # both nodes are on this machine
    assert host.sent_bytes_per_s == host.received_bytes_per_s
    assert (host.sent_bytes_per_s or 0.0) > 0.0
    assert now.awaited.startswith("the push of ranks 0, 1 to shards 0, 1, "), now.awaited


CASES = {
    case.__name__: case
    for case in (
        two_workers_share_one_relay_that_ends_with_the_optimizer,
        a_relay_that_is_killed_or_halted_is_replaced_and_nothing_is_lost,
        a_relay_whose_workers_have_left_ends_and_another_begins_on_demand,
        what_was_replaced_or_resharded_is_read_by_the_next_pull,
        what_lives_on_keeps_nothing_of_shards_that_are_replaced,
        a_supervisor_under_a_name_keeps_nothing_of_shards_that_are_replaced,
        no_process_has_more_open_than_is_planned,
        status_shows_what_goes_between_hosts_and_what_a_step_waits_for,
        ranks_of_a_group_are_placed_on_one_node_and_the_groups_in_turn,
        the_pushes_of_a_group_go_as_one_and_again_where_their_relay_is_killed,
        tensors_that_leave_before_their_push_count_once_and_also_where_the_relay_is_killed,
    )
}


def main() -> None:
    how = {"object_store_memory": STORE}
    head = {"num_cpus": 2, "include_dashboard": False} | how
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, resources={"shard": 4}, **how)
    ray.init(address=cluster.address, log_to_driver=False)
    for name in map(str.strip, sys.stdin):
        two = Two(
            sum_group=2 if "group" in name else 1,
            name="held" if "under_a_name" in name else None,
            shard_timeout_s=5.0,
        )
        CASES[name](two)
        two.close()
        print(name, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
