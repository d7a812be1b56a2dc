"""The formulas of `planning/memory.py` cover what the code reserves; such stores spill nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from distnadam.cli import main
from distnadam.planning import memory
from distnadam.planning.planned_run import PlannedRun
from distnadam.shard.state import ShardState
from distnadam.tensors.layout import Layout, sizes_of
from distnadam.transport.shared_memory import arena_bytes
from tests.deploy.tree import ROOT
from tests.transport.tcp_shards import LAYOUT, Host, Shards, gradients

STORES = """
import json, threading, time
import numpy as np
import ray
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from distnadam import DistNadam, Options
from distnadam.cli import main
from distnadam.planning import memory
from distnadam.planning.planned_run import PlannedRun

P, W = 10_000_000, 2
run = PlannedRun(parameters=P, workers_per_host=W, shards=2, replicas=1, shard_hosts=2)
nodes = {"shards": memory.shard_node(run), "workers": memory.worker_node(run)}
stores = {role: node.store - memory.STORE_SPARE for role, node in nodes.items()}
head = {
    "num_cpus": 0,
    "object_store_memory": memory.head_node(run).store,
    "include_dashboard": False,
}
cluster = Cluster(initialize_head=True, head_node_args=head)
for role in ("shards", "shards", "workers"):
    cluster.add_node(num_cpus=4, object_store_memory=stores[role], labels={"distnadam/role": role})
ray.init(address=cluster.address, log_to_driver=False)


class Steps:
    def __init__(self, optimizer, rank):
        self.worker = optimizer.worker(rank)

    def run(self, steps):
        gradients = {"w": np.ones(P, np.float32)}
        self.worker.pull()
        for _ in range(steps):
            params = self.worker.step(gradients)
        return float(params["w"][0])


options = Options(
    shard_cpus=0.5,
    worker_cpus=1,
    label_selector={"distnadam/role": "shards"},
    worker_label_selector={"distnadam/role": "workers"},
)
sized = DistNadam(num_shards=2, num_workers=W, replicas=1, backend="ray", options=options)
with sized.build({"w": np.ones(P, np.float32)}) as optimizer:
    team = optimizer.team(lambda rank: Steps(optimizer, rank))
    for rank in range(W):
        team.call(rank, "run", 10)
    ends = []
    while len(ends) < W:
        ends += [end for _, end in team.results(1.0)]
    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()]
    stats = [node_stats(*node, include_memory_info=False).store_stats for node in nodes]
    team.close()
over = [stat.spilled_bytes_total + stat.object_store_bytes_fallback for stat in stats]
created = sum(stat.cumulative_created_bytes for stat in stats)
ray.shutdown()
cluster.shutdown()
print(json.dumps({"ends": ends, "over": over, "created": created / P}))
"""


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_cluster_whose_stores_have_the_formulas_size_spills_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("the statistics of Ray's stores need the extra metrics")
    env = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "-c", STORES],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ends"][0] == result["ends"][1] != 1.0
    assert result["over"] == [0] * 4


def test_lanes_and_moments_take_the_bytes_that_the_formulas_count() -> None:
    layout = Layout.of({"w": np.zeros(2**20, np.float32)})
    assert arena_bytes(layout.sizes, 2) == 8 * 2**20  # a node's parameters
    assert arena_bytes(layout.sizes, 1) == 4 * 2**20  # a worker's gradients
    rounded = layout.for_workers("bfloat16").pull_dtypes
    masters = ShardState.empty(layout.cuts(1)[0], dtypes=rounded).masters
    assert arena_bytes(layout.sizes, 2, rounded) + masters["float32"].nbytes == 8 * 2**20
    states = [ShardState.empty(ranges) for ranges in layout.cuts(2)]
    assert (
        sum(flat[space].nbytes for state in states for flat in (state.m, state.v) for space in flat)
        == 8 * 2**20
    )


def test_what_a_shard_keeps_for_other_hosts_is_within_the_bytes_that_the_formulas_count() -> None:
    shards = Shards()
    host = Host(shards)
    workers = [host.worker(rank) for rank in (0, 1)]
    for step in range(1, 6):
        numbers = [worker.push(step, gradients(step, worker.rank)) for worker in workers]
        for worker, number in zip(workers, numbers, strict=True):
            worker.collect(number)
    whole = 0
    for shard in shards.all:
        held = sizes_of(shard.spec.ranges)
        size = held["float32"] + 2 * held["float64"]  # in float32 parameters
        kept = shard.server._landing.num_bytes + shard.server._copies.num_bytes
        assert 4 * 3 * size <= kept <= memory.between_hosts(len(workers)) * size
        whole += size
    for worker in workers:
        worker.client.close()
    host.close()
    shards.close()
    assert whole == LAYOUT.sizes["float32"] + 2 * LAYOUT.sizes["float64"]


def run(**changes: int) -> PlannedRun:
    asked = {
        "parameters": 10**9,
        "hosts": 2,
        "workers_per_host": 2,
        "shards": 4,
        "replicas": 1,
        "shard_hosts": 3,
    }
    return PlannedRun(**(asked | changes))


@pytest.mark.parametrize(
    "of", [memory.shard_node, memory.worker_node, memory.shared_node, memory.head_node]
)
def test_a_node_needs_more_for_more_of_everything_and_memory_holds_the_store(
    of: Callable[[PlannedRun], memory.Node],
) -> None:
    node = of(run())
    assert node.store < node.shm < node.memory
    for name, more in (
        ("parameters", 2 * 10**9),
        ("hosts", 4),
        ("replicas", 1),
        ("workers_per_host", 4),
        ("ema", True),
    ):
        assert of(run(**{name: more})).memory >= node.memory
    assert of(run(shard_hosts=8)).memory <= node.memory


def test_the_table_in_the_readme_is_what_the_command_prints() -> None:
    text = (ROOT / "deploy" / "README.md").read_text()
    found = re.search(r"    distnadam plan (--parameters .*)\n\n((?:    .*\n)+)", text)
    assert found is not None
    done = CliRunner().invoke(main, ["plan", *found[1].split()])
    assert done.exit_code == 0, done.output
    printed = {tuple(re.findall(r"[^│┃\s]+", line)) for line in done.output.splitlines()}
    assert {tuple(line.split()) for line in found[2].splitlines()} <= printed
