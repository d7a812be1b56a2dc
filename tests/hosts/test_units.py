"""Hosts run what the units of deploy/hosts say: a changed unit starts another node."""

import shutil
from pathlib import Path

import pytest

from tests.hosts import cluster
from tests.hosts.network import why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ASK = """
import shutil
import ray
from tests.hosts.program import say

ray.init(log_to_driver=False)
node = next(node for node in ray.nodes() if node["Labels"].get("of") == "unit")
find = ray.remote(num_cpus=1, label_selector={"of": "unit"})(shutil.which)
found = ray.get([find.remote(name) for name in ("ray", "distnadam")])
say(address=node["NodeManagerAddress"], found=found)
"""


def test_a_changed_unit_starts_another_node_and_ours_finds_our_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    shutil.copytree(cluster.UNITS, tmp_path / "units", ignore=shutil.ignore_patterns("token"))
    unit = tmp_path / "units" / "distnadam-node.service"
    unit.write_text(unit.read_text().replace("--labels=${NODE_LABELS}", "--labels=of=unit"))
    monkeypatch.setattr(cluster, "UNITS", tmp_path / "units")
    with cluster.Cluster(tmp_path, [{"CPU": 1}, {"CPU": 1}]) as hosts:
        program = hosts.python(hosts.hosts[0], "-c", ASK)
        said = program.first("found")
        program.finish()
    assert said["address"] == hosts.hosts[1].address
    assert said["found"] == [str(cluster.PROGRAMS / "ray"), str(cluster.PROGRAMS / "distnadam")]
