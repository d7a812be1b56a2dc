"""Random faults of every kind on training hosts change no bit, and every push counts once."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts import chaos
from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.faults import FAULTS, HOSTS, SHARD_TIMEOUT_S, Fault
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

pytestmark = pytest.mark.slow

RESOURCES = ALL_ON_ANY
SEED = 6


@pytest.mark.parametrize(
    ("count", "kinds"),
    [
        pytest.param(4, HOSTS, marks=pytest.mark.timeout(600), id="of hosts"),
        pytest.param(
            60, FAULTS, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)], id="of every kind"
        ),
    ],
)
def test_faults_of_the_network_and_of_processes_change_no_bit(
    count: int,
    kinds: Sequence[Fault],
    hosts: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = chaos.play(count, SEED, hosts, tmp_path, kinds)
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.differences, str(report)
    assert sum(map(len, report.seconds.values())) == count
    assert len({kind for kind, _ in report.seconds}) == min(count, len(kinds))


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_saturated_cable_is_no_death(hosts: Cluster, tmp_path: Path) -> None:
    """Each step takes longer than a lease, and than Ray waits for a host, with the cables full."""
    about = {
        "steps": 24,
        "size": 2_000_000,
        "num_workers": 3,
        "num_shards": 2,
        "replicas": 1,
        "directory": str(tmp_path / "hosts"),
        "options": {
            "shard_resources": {"shard": 1},
            "worker_cpus": 0.5,
            "shard_timeout_s": SHARD_TIMEOUT_S,
        },
    }
    program = hosts.python(hosts.hosts[0], "-m", "tests.hosts.train", json.dumps(about))
    program.first("standbys", lambda count: count == 2)
    before = program.first("step", lambda step: step >= 6)["step"]
    full, began = time.time(), time.monotonic()
    for host in hosts.hosts:
        host.shape(20e6)
    program.first("step", lambda step: step >= before + 3)
    assert time.monotonic() - began > 3 * SHARD_TIMEOUT_S / 4, "the cables were not full"
    decided = [line.text for line in hosts.logged("^supervisor: ", since=full)]
    for host in hosts.hosts:
        host.unshape()
    program.first("done")
    program.finish()
    assert not decided, decided
    assert digest(tmp_path / "hosts") == train_in_one_process(tmp_path / "alone", about)
