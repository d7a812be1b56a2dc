"""A host joins during training, and `reshard` by name from another process puts shards on it, whose
standbys on the other hosts follow them by TCP.
"""

import json
import time
from pathlib import Path

import pytest

from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(400)]

RESOURCES = ALL_ON_ANY
RESHARD = """
import json
import time
from distnadam import DistNadam
from tests.hosts.program import say
from tests.hosts.train import hosts_of

optimizer = DistNadam.connect("growing")
before = hosts_of(optimizer.shards.backend)
optimizer.reshard(3)
say(before=before, after=hosts_of(optimizer.shards.backend))
while not all(shard.replicated is not None for shard in optimizer.shards.describe_all()):
    time.sleep(0.1)
say(standbys=3)
"""


def test_a_host_that_joins_while_training_goes_on_gets_a_shard(
    hosts: Cluster, tmp_path: Path
) -> None:
    about = {
        "steps": 400,
        "size": 20_000,
        "pause_s": 0.01,
        "num_workers": 3,
        "num_shards": 2,
        "replicas": 1,
        "name": "growing",
    }
    began, resharded = time.time(), tmp_path / "resharded"
    # however slow the machine, the steps from 300 on are made with the new shards
    about |= {"awaits": (300, str(resharded))}
    about |= {
        "directory": str(tmp_path / "hosts"),
        # all four places are taken: the new host gets the new shards, made beside the old ones
        "options": {"shard_resources": {"place": 1}, "worker_cpus": 0.5},
    }
    program = hosts.python(hosts.hosts[0], "-m", "tests.hosts.train", json.dumps(about))
    program.first("step")
    (new,) = hosts.add({"CPU": 2, "place": 3})
    resharding = hosts.python(new, "-c", RESHARD)
    said = resharding.first("after")
    resharding.first("standbys")
    resharding.finish()
    assert new.address not in said["before"] and len(said["before"]) == 2
    assert said["after"] == 3 * [new.address]
    followed = hosts.logged("its standby follows by TCP", since=said["time"] - 60)
    assert {line.text.split(":")[0] for line in followed if line.host == new.address} == {
        "shard 0",
        "shard 1",
        "shard 2",
    }
    resharded.touch()
    program.finish()
    reached = [line.text for line in hosts.logged(r"^worker .*2\]", since=began)]
    assert all(text.endswith("shards none by Ray objects") for text in reached)
    reach_the_third = {text.split(":")[0] for text in reached}
    assert reach_the_third == {"worker 0", "worker 1", "worker 2"}
    assert digest(tmp_path / "hosts") == train_in_one_process(
        tmp_path / "alone", about | {"name": None}
    )
