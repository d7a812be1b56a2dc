"""A Ray of three nodes of this machine, of which two are left in every order: shards, standbys and
ranks move, and nobody goes back.

python -m tests.backends.ray.draining [CASE ...]: each case that holds is named in the output, and
the first that does not ends the process.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private import state
from ray.cluster_utils import Cluster

from distnadam import DistNadam, Options, fit
from distnadam.backends.ray.cordon import RayHosts
from distnadam.backends.ray.worker_group import RayWorkerGroup
from distnadam.callbacks import ReduceLROnPlateau
from distnadam.errors import ClusterError, ConfigError, InsufficientResources
from distnadam.training.callbacks import Callback
from tests.backends.ray.on_two_nodes import (
    PARAMS,
    STORE,
    Placed,
    gradient,
    relays,
    right,
    supervisors,
)
from tests.descriptors import MEMORY, descriptors_of
from tests.eventually import eventually
from tests.training.test_task_state import Averaging, kept

OPTIONS = Options(shard_resources={"shard": 1}, shard_timeout_s=5.0)


class Stepping:
    """Steps in a thread, from when it is made until it ends."""

    def __init__(self, optimizer: DistNadam) -> None:
        self._optimizer = optimizer
        self._rounds = 0
        self._error: BaseException | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ends.wait(0.01):
                both = [gradient(self._rounds + 1, rank)["w"] for rank in (0, 1)]
                self._optimizer.apply_gradients({"w": (both[0] + both[1]) / np.float32(2)})
                self._rounds += 1
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        """Stop; what was trained is what one process trains, and no shard went back."""
        self._ends.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._optimizer.get_params()["w"].tobytes() == right(self._rounds)


def optimizer(**how: Any) -> DistNadam:
    return DistNadam(num_shards=2, backend="ray", options=OPTIONS, **how).build(PARAMS)


def has_left(hosts: RayHosts, node: str) -> None:
    eventually(lambda: not hosts.processes_on(node))


def all_followed(one: DistNadam) -> bool:
    return all(each.replicated is not None for each in one.shards.describe_all())


def both_nodes_are_left_in_turn_with_shards_and_standbys(
    hosts: RayHosts, first: str, second: str
) -> None:
    with optimizer(replicas=1) as one:
        steps = Stepping(one)
        hosts.cordon(first)
        has_left(hosts, first)
        hosts.cordon(first)
        hosts.cordon(second)  # nobody has anywhere to go
        time.sleep(3.0)
        assert hosts.processes_on(second)
        hosts.uncordon(first)
        has_left(hosts, second)
        steps.end()


def standbys_of(one: DistNadam, shard: int) -> list[int]:
    """The processes of a shard's standbys that run."""
    primary = one.shards.backend.addresses[shard].pid
    running = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
    named = [each for each in running if each["ActorClassName"].endswith(f"Shard {shard}")]
    return [pid for each in named if (pid := int(each["Pid"])) != primary]


def has_two(one: DistNadam, shard: int) -> bool:
    return len(standbys_of(one, shard)) == 2


def is_alone_after(one: DistNadam, shard: int, old: int) -> bool:
    found = standbys_of(one, shard)
    return bool(found) and old not in found


def a_shard_that_dies_while_its_standby_moves_has_one(
    hosts: RayHosts, first: str, second: str
) -> None:
    """It is killed once the successor's process is there, as that is filled, or a moment after."""
    for wait_s in (0.0, 0.1, None):
        with optimizer(replicas=1) as one:  # whose standbys are on the other node each
            steps = Stepping(one)
            eventually(partial(all_followed, one))
            addresses = one.shards.backend.addresses
            stays = [address.node for address in addresses].index(second)
            (old,) = standbys_of(one, stays)
            hosts.cordon(first)
            if wait_s is None:
                eventually(partial(is_alone_after, one, stays, old))
            else:
                eventually(partial(has_two, one, stays))
                time.sleep(wait_s)
            os.kill(addresses[stays].pid, signal.SIGKILL)
            has_left(hosts, first)
            hosts.uncordon(first)
            eventually(partial(all_followed, one))
            steps.end()
            recoveries = one.shards.backend.supervisor.status().recoveries
            assert recoveries["promoted"] >= 1 and recoveries["rewound"] == 0, recoveries


def what_lives_through_promotions_and_drains_keeps_nothing_of_them(
    hosts: RayHosts, first: str, second: str
) -> None:
    """The supervisor, this process, and a worker and its relay beside the shards' hosts."""
    with optimizer(replicas=1, num_workers=1) as one:
        worker = one.worker(0)
        counts = []
        eventually(lambda: all_followed(one))
        for round in range(1, 4):
            (killed, *_) = one.shards.backend.addresses
            os.kill(killed.pid, signal.SIGKILL)
            worker.step(gradient(round, 0))
            hosts.cordon(first)
            has_left(hosts, first)
            hosts.uncordon(first)
            worker.step(gradient(round, 0))
            eventually(lambda: all_followed(one))
            counts.append([descriptors_of(pid) for pid in (os.getpid(), *relays(), *supervisors())])
        assert [len(each) for each in counts] == [3] * len(counts)
        for before, after in zip(counts[0], counts[-1], strict=True):
            assert after[MEMORY] <= before[MEMORY], (before, after)
            assert after.total() <= before.total() + 4, (before, after)  # Ray's own vary
        worker.close()


def a_supervisor_that_is_killed_in_a_hand_over_is_succeeded(
    hosts: RayHosts, first: str, second: str
) -> None:
    with optimizer(name="left") as one:
        steps = Stepping(one)
        for node, wait_s in ((first, 1.5), (second, 2.2)):
            hosts.cordon(node)
            time.sleep(wait_s)
            actors = state.actors().values()
            (supervisor,) = [
                actor["Pid"]
                for actor in actors
                if actor["State"] == "ALIVE" and "left Supervisor" in actor["ActorClassName"]
            ]
            os.kill(supervisor, signal.SIGKILL)
            has_left(hosts, node)
            hosts.uncordon(node)
        steps.end()


def what_is_new_goes_to_no_node_that_is_to_be_left(
    hosts: RayHosts, first: str, second: str
) -> None:
    with optimizer() as one:
        hosts.cordon(first)
        has_left(hosts, first)
        hosts.cordon(second)
        left = r"1 suitable node\(s\) have room for 0, 2 more to be left \(`distnadam uncordon`"
        with pytest.raises(InsufficientResources, match=left):
            optimizer()
        command = [sys.executable, "-m", "distnadam", "drain", second, "--timeout", "2"]
        late = subprocess.run(
            [*command, "--address", ray.get_runtime_context().gcs_address],
            capture_output=True,
            text=True,
        )
        assert late.returncode == 1, late
        assert "after 2 s there is still Shard 0, Shard 1; it stays cordoned" in late.stderr, late
        hosts.uncordon(first)
        with optimizer() as other:
            assert {each.node for each in other.shards.backend.addresses} == {first}
        one.apply_gradients(gradient(1, 0))


def programs_that_are_there_are_named(hosts: RayHosts, first: str, second: str) -> None:
    here = ray.get_runtime_context().get_node_id()
    assert hosts.processes_on(here) == [], "this one asks"
    address = ray.get_runtime_context().gcs_address
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False); print('in', flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        (named,) = hosts.processes_on(here)
        assert named.startswith(f"the driver {other.pid} ("), named
        other.communicate("\n")
    eventually(lambda: hosts.processes_on(here) == [])


def saves_and_reshards_amid_hand_overs_lose_nothing(
    hosts: RayHosts, first: str, second: str
) -> None:
    with optimizer() as one, tempfile.TemporaryDirectory() as directory:
        steps = Stepping(one)
        done = 0
        for node, shards in ((first, 3), (second, 1)):
            hosts.cordon(node)
            while hosts.processes_on(node):
                with contextlib.suppress(ClusterError):  # a shard leaves just now: try again
                    one.save(Path(directory) / f"{shards}")
                    one.reshard(shards)
                    done += 1
            hosts.uncordon(node)
        assert done and len(one.shards.ranges) <= 3
        steps.end()


def a_name_of_several_nodes_or_of_none_is_refused(hosts: RayHosts, first: str, second: str) -> None:
    hosts.cordon(first)
    hosts.uncordon(first[:12])
    for host in ("", ray.util.get_node_ip_address(), "nowhere"):
        with pytest.raises(ConfigError) as refused:
            hosts.cordon(host)
        assert repr(host) in str(refused.value)


def ranks_without_room_elsewhere_stay(hosts: RayHosts, first: str, second: str) -> None:
    where = Options(worker_cpus=1.0)
    group = RayWorkerGroup(6, Placed, where)  # all the CPUs that there are
    nodes: dict[int, str] = {}
    for rank in range(6):
        group.call(rank, "node")
    while len(nodes) < 6:
        nodes |= dict(group.results(60.0))
    hosts.cordon(first)
    time.sleep(1.5)
    assert first in nodes.values() and group.to_leave() == frozenset()
    hosts.uncordon(first)
    group.close()


class Slow(Averaging):
    def batch(self, step: int, rank: int, world_size: int) -> Any:
        time.sleep(0.02)
        return super().batch(step, rank, world_size)


class LeavesInTurn(Callback):
    """Has one host be left, and later the other."""

    def __init__(self, hosts: RayHosts, first: str, second: str) -> None:
        self._hosts = hosts
        self._turns = {10: (second, first), 40: (first, second)}

    def on_evaluate(self, step: int, metrics: Any) -> None:
        if step in self._turns:
            back, left = self._turns[step]
            self._hosts.uncordon(back)
            self._hosts.cordon(left)


def trained(directory: Path, *more: Callback, **how: Any) -> tuple[Any, ...]:
    """Train a task with state of its own; return all that must be as undisturbed."""
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0, cooldown=1)
    history = fit(
        Slow(),
        steps=80,
        num_workers=2,
        checkpoint_dir=directory,
        save_every=1000,
        evaluate_every=10,
        callbacks=[plateau, *more],
        verbose=0,
        **how,
    )
    assert len(set(history.learning_rates)) > 2
    return (
        kept(directory),
        history.steps,
        history.losses,
        history.learning_rates,
        history.evaluations,
    )


def ranks_with_state_of_their_own_that_move_change_no_bit(
    hosts: RayHosts, first: str, second: str
) -> None:
    """The task's state, its place in the data, and what a callback decides by go with them."""
    options = Options(
        worker_cpus=1.0,
        shard_resources={"shard": 1},
        worker_label_selector={"ray.io/node-id": f"in({first},{second})"},
    )
    moved = Counter[str]()

    class Counts(Callback):
        def on_recovery(self, step: int, who: str, text: str) -> None:
            moved["the host is to be left" in text] += 1

    with tempfile.TemporaryDirectory() as found:
        leaves = LeavesInTurn(hosts, first, second)
        optimizer = DistNadam(options=options)
        how: dict[str, Any] = {"backend": "ray", "optimizer": optimizer, "num_shards": 2}
        disturbed = trained(Path(found) / "a", leaves, Counts(), **how)
        assert 1 <= moved[True] <= 4 and not moved[False], moved  # once for each host, if ever
        assert disturbed == trained(Path(found) / "b", backend="local")


CASES = (
    both_nodes_are_left_in_turn_with_shards_and_standbys,
    a_shard_that_dies_while_its_standby_moves_has_one,
    what_lives_through_promotions_and_drains_keeps_nothing_of_them,
    a_supervisor_that_is_killed_in_a_hand_over_is_succeeded,
    what_is_new_goes_to_no_node_that_is_to_be_left,
    programs_that_are_there_are_named,
    saves_and_reshards_amid_hand_overs_lose_nothing,
    ranks_with_state_of_their_own_that_move_change_no_bit,
    a_name_of_several_nodes_or_of_none_is_refused,
    ranks_without_room_elsewhere_stay,
)


def main() -> None:
    how = {"object_store_memory": STORE}
    head = {"num_cpus": 2, "include_dashboard": False} | how
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=2, resources={"shard": 9}, **how) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    hosts = RayHosts()
    first, second = (node.node_id for node in nodes)
    for case in [each for each in CASES if not sys.argv[1:] or each.__name__ in sys.argv]:
        case(hosts, first, second)
        for node in (first, second):
            hosts.uncordon(node)
        print(case.__name__, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
