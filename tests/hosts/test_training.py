"""Three hosts train to the bits of one process, by shared memory within hosts, else Ray objects."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import ONE_EACH, Cluster
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ONE_EACH
THREE = {
    "num_workers": 3,
    "num_shards": 3,
    "options": {"worker_cpus": 1, "shard_resources": {"shard": 1}},
}


def train_on(cluster: Cluster, directory: Path, about: dict[str, Any]) -> list[str]:
    """Train over the hosts, the driver on the head; return the shards' hosts."""
    program = cluster.python(
        cluster.hosts[0],
        "-m",
        "tests.hosts.train",
        json.dumps({**about, "directory": str(directory)}),
    )
    shards: list[str] = program.first("shards")["shards"]
    program.first("done")
    program.finish()
    return shards


@pytest.mark.parametrize(
    "task",
    [
        pytest.param({"steps": 60}, id="digits"),
        pytest.param(
            {"steps": 5, "size": 10**7}, id="ten million parameters", marks=pytest.mark.nightly
        ),
    ],
)
def test_hosts_train_to_the_bits_of_one_process_over_both_transports(
    task: dict[str, Any], hosts: Cluster, tmp_path: Path
) -> None:
    began = time.time()
    shards = train_on(hosts, tmp_path / "hosts", task | THREE)
    assert sorted(shards) == sorted(host.address for host in hosts.hosts)
    transports = {line.host: line.text for line in hosts.logged("by shared memory", since=began)}
    # Ray's node decides: all these processes share a hostname, and /dev/shm
    for rank_host, text in transports.items():
        here = [index for index, host in enumerate(shards) if host == rank_host]
        others = [index for index, host in enumerate(shards) if host != rank_host]
        assert text.endswith(
            f"shards {here} by shared memory (same node), shards {others} by TCP, shards none by "
            "Ray objects"
        ), text
    assert sorted(transports) == sorted(shards), "a worker on each host"
    assert digest(tmp_path / "hosts") == train_in_one_process(tmp_path / "alone", task | THREE)


@pytest.mark.nightly
def test_hosts_with_certificates_train_to_the_same_bits(
    hosts_with_certificates: Cluster, tmp_path: Path
) -> None:
    hosts = hosts_with_certificates
    train_on(hosts, tmp_path / "hosts", {"steps": 30} | THREE)
    ask = (
        f"openssl s_client -connect {hosts.address} -CAfile {hosts.env['RAY_TLS_CA_CERT']} "
        "-verify_return_error -brief"
    )
    answer = hosts.run(hosts.hosts[1], "sh", "-c", f"{ask} < /dev/null || true").finish()
    assert "Verification: OK" in answer
    assert digest(tmp_path / "hosts") == train_in_one_process(
        tmp_path / "alone", {"steps": 30} | THREE
    )
