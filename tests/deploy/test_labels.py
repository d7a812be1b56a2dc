"""Shards, standbys and workers go to the labelled nodes of a real Ray cluster of four nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]

GROUPS = """
import json, time
import numpy as np
import ray
from ray.cluster_utils import Cluster
from distnadam import DistNadam, Options

STORE = 80 * 2**20
head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
for role in ("shards", "shards", "workers"):
    cluster.add_node(num_cpus=4, object_store_memory=STORE, labels={"distnadam/role": role})
ray.init(address=cluster.address, log_to_driver=False)
roles = {node["NodeID"]: node["Labels"].get("distnadam/role", "head") for node in ray.nodes()}


class Where:
    def __init__(self, rank):
        self.rank = rank

    def node(self):
        return ray.get_runtime_context().get_node_id()


options = Options(
    label_selector={"distnadam/role": "shards"},
    worker_label_selector={"distnadam/role": "workers"},
    shard_cpus=0.5,
    worker_cpus=1,
)
grouped = DistNadam(
    name="grouped", num_shards=4, num_workers=2, replicas=1, backend="ray", options=options
)
with grouped.build({"w": np.ones(9000, np.float32)}) as optimizer:
    shards, standbys = {}, {}
    while len(standbys) < 4:  # they start in the background
        for entry in ray.util.list_named_actors(all_namespaces=True):
            name = entry["name"].partition("/")[2].partition("-")[0]
            if name and name not in shards | standbys:
                actor = ray.get_actor(entry["name"], namespace=entry["namespace"])
                address = ray.get(actor.address.remote())
                (standbys if name.endswith("s") else shards)[name] = address.node
    team = optimizer.team(Where)
    for rank in range(2):
        team.call(rank, "node")
    workers = []
    while len(workers) < 2:
        workers += [node for _, node in team.results(1.0)]
    supervisor = ray.get(optimizer.shards.backend.supervisor.actor.about.remote())["node"]
    supervisor = supervisor.partition("id ")[2][:12]
    team.close()
result = {
    "roles": {
        "workers": [roles[n] for n in workers],
        "shards": [roles[n] for n in (shards | standbys).values()],
    },
    "apart": [shards[i] != standbys[i + "s"] for i in shards],
    "supervisor": [role for node, role in roles.items() if node.startswith(supervisor)],
}
ray.shutdown()
cluster.shutdown()
print(json.dumps(result))
"""


def test_shards_and_workers_stay_in_their_groups_and_standbys_on_other_nodes(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUPS],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["roles"] == {"workers": ["workers"] * 2, "shards": ["shards"] * 8}
    assert result["apart"] == [True] * 4
    assert result["supervisor"] == ["shards"]
