"""With `min_workers` the other hosts go on without one that is cut off, by TCP."""

import json
import time

import pytest

from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.elastic import expected
from tests.hosts.network import Host
from tests.hosts.program import Program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ALL_ON_ANY
STEPS = 100


def test_rounds_go_on_without_a_host_that_is_cut_off(hosts: Cluster) -> None:
    began = time.time()
    about = {
        "num_workers": 3,
        "name": "elastic",
        "steps": STEPS,
        "pause_s": 0.02,
        "options": {
            "shard_resources": {"shard": 1},
            "min_workers": 2,
            "rejoin_timeout_s": 1.0,
            "shard_timeout_s": 8.0,
        },
    }

    def start(host: Host, rank: int) -> Program:
        told = json.dumps(about | {"rank": rank})
        return hosts.python(host, "-m", "tests.hosts.elastic", told)

    first = start(hosts.hosts[0], 0)
    shard = hosts.host_at(first.first("shards")["shards"][0])
    (other,) = (host for host in hosts.hosts[1:] if host is not shard)
    beside, far = start(shard, 1), start(other, 2)
    far.first("step", lambda step: step >= 20)
    hosts.kill(other, "cut")
    beside.first("step", lambda step: step == STEPS)
    beside.finish()
    first.tell("end")
    assert first.first("digest")["digest"] == expected(STEPS)
    first.finish()
    assert hosts.logged("^ranks 2 leave", since=began)
    by_tcp = hosts.logged(r"^worker 0: shards none by .*, shards \[0\] by TCP", since=began)
    assert by_tcp, "the driver's host has no shard"
