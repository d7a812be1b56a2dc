"""The formulas of deploy/sizes.py cover what the code reserves, and such stores spill nothing."""

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

from deploy import sizes
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
from deploy import sizes

P, W = 10_000_000, 2
run = sizes.Run(parameters=P, workers=W, shards=2, replicas=1, shard_nodes=2, workers_per_node=W)
nodes = {"shards": sizes.shard_node(run), "workers": sizes.worker_node(run)}
stores = {role: node.store - sizes.STORE_SPARE for role, node in nodes.items()}
head = {
    "num_cpus": 0,
    "object_store_memory": sizes.head_node(run).store,
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
        assert 4 * 3 * size <= kept <= sizes.between_hosts(len(workers)) * size
        whole += size
    for worker in workers:
        worker.client.close()
    host.close()
    shards.close()
    assert whole == LAYOUT.sizes["float32"] + 2 * LAYOUT.sizes["float64"]


def run(**changes: int) -> sizes.Run:
    asked = {
        "parameters": 10**9,
        "workers": 4,
        "shards": 4,
        "replicas": 1,
        "shard_nodes": 3,
        "workers_per_node": 2,
    }
    return sizes.Run(**(asked | changes))


@pytest.mark.parametrize(
    "of", [sizes.shard_node, sizes.worker_node, sizes.shared_node, sizes.head_node]
)
def test_a_node_needs_more_for_more_of_everything_and_memory_holds_the_store(
    of: Callable[[sizes.Run], sizes.Node],
) -> None:
    node = of(run())
    assert node.store < node.shm < node.memory
    for name, more in (
        ("parameters", 2 * 10**9),
        ("workers", 8),
        ("replicas", 1),
        ("workers_per_node", 4),
        ("ema", True),
    ):
        assert of(run(**{name: more})).memory >= node.memory
    assert of(run(shard_nodes=8)).memory <= node.memory


def test_the_table_in_the_readme_is_what_the_script_prints() -> None:
    text = (ROOT / "deploy" / "README.md").read_text()
    found = re.search(r"    python3 deploy/sizes\.py (--parameters .*)\n\n((?:    .*\n)+)", text)
    assert found is not None
    done = subprocess.run(
        [sys.executable, ROOT / "deploy/sizes.py", *found[1].split()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [line.strip() for line in found[2].splitlines()] == [
        line.strip() for line in done.stdout.splitlines()
    ]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "--parameters 1e9 --workers -3",
            "argument --workers: expected a whole number of at least 1, got '-3'",
        ),
        (
            "--parameters 1e9 --shards 0",
            "argument --shards: expected a whole number of at least 1, got '0'",
        ),
        (
            "--parameters 1e9 --shard-nodes two",
            "argument --shard-nodes: expected a whole number of at least 1, got 'two'",
        ),
        (
            "--parameters 1e9 --workers 2 --workers-per-node 3",
            "argument --workers-per-node: 3 on one node are more than the 2 workers",
        ),
        ("--parameters 1e9 --replicas 2", "argument --replicas: invalid choice: "),
        (
            "--parameters much",
            "argument --parameters: expected a whole number of at least 1, such as 1e9, got 'much'",
        ),
        ("--parameters -1e9", "argument --parameters: expected"),
        ("--parameters 0.5", "such as 1e9, got '0.5'"),
        ("--parameters inf", "such as 1e9, got 'inf'"),
        ("--workers 2", "the following arguments are required: --parameters"),
    ],
)
def test_sizes_of_what_cannot_be_are_refused_in_so_many_words(
    asked: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sizes.py", *asked.split()])
    with pytest.raises(SystemExit) as ended:
        sizes.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
