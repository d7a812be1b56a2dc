"""A host is lost in the middle of `fit`, cut off or killed: the same bits at the end."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.program import Program
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ALL_ON_ANY
SEED = 6
OPTIONS = {"shard_resources": {"shard": 1}, "worker_cpus": 0.5, "shard_timeout_s": 8.0}


def begin(hosts: Cluster, replicas: int, directory: Path) -> tuple[dict[str, Any], Program]:
    """Start training on the head, and wait until every shard has its standby."""
    about = {
        "steps": 300,
        "size": 20_000,
        "pause_s": 0.01,
        "num_workers": 3,
        "num_shards": 3,
        "save_every": 40,
        "replicas": replicas,
    }
    about |= {
        "directory": str(directory / "hosts"),
        "options": OPTIONS | {"checkpoint_dir": str(directory / "hosts")},
    }
    began = time.time()
    program = hosts.python(hosts.hosts[0], "-m", "tests.hosts.train", json.dumps(about))
    if replicas:
        program.first("standbys", lambda count: count == 3)
        followed = hosts.logged("its standby follows by TCP", since=began)
        assert {line.text.split(":")[0] for line in followed} == {"shard 0", "shard 1", "shard 2"}
    return about, program


@pytest.mark.parametrize(
    ("how", "replicas"),
    [
        ("cut", 1),
        pytest.param("kill", 0, marks=pytest.mark.nightly),
        pytest.param("cut", 0, marks=pytest.mark.nightly),
        pytest.param("kill", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_loses_a_host_ends_with_the_bits_of_one_process(
    how: str, replicas: int, hosts: Cluster, tmp_path: Path
) -> None:
    rng = np.random.default_rng([SEED, replicas, len(how)])
    about, program = begin(hosts, replicas, tmp_path)
    shards = program.first("shards")["shards"]
    moment = rng.integers(50, 150)
    program.first("step", lambda step: step >= moment)
    # steps are reported several at a time, so the fault comes in the middle of any
    time.sleep(rng.uniform(0, 0.3))
    victim = hosts.host_at(shards[int(rng.integers(len(shards)))])
    struck = hosts.kill(victim, how)
    program.first("done")
    program.finish()
    decisions = " ".join(line.text for line in hosts.logged("^supervisor: ", since=struck))
    # a rewind may follow a promotion, if a lost worker's gradient is missing
    assert ("Promote" if replicas else "Rewind") in decisions, decisions
    assert digest(tmp_path / "hosts") == train_in_one_process(tmp_path / "alone", about)


@pytest.mark.nightly
def test_cables_that_are_out_for_moments_change_no_bit(hosts: Cluster, tmp_path: Path) -> None:
    """An outage shorter than any timeout, of the head's link too, and in one direction only."""
    rng = np.random.default_rng(SEED)
    about, program = begin(hosts, 1, tmp_path)
    for number, (host, how) in enumerate(
        zip(hosts.hosts, ("cut", "silence", "deafen"), strict=True)
    ):
        program.first("step", lambda step, least=60 * (number + 1): step >= least)
        time.sleep(rng.uniform(0, 0.3))
        hosts.kill(host, how)
        time.sleep(rng.uniform(0.1, 1.0))
        host.unshape()
        host.mend()
        hosts.struck.discard(host)
    program.first("done")
    program.finish()
    assert digest(tmp_path / "hosts") == train_in_one_process(tmp_path / "alone", about)
