"""A host is left before it goes away, by command or by a notice: nothing is lost, not even time."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.network import Host
from tests.hosts.program import Program
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = ALL_ON_ANY
OPTIONS = {"shard_resources": {"shard": 1}, "worker_cpus": 0.5, "shard_timeout_s": 8.0}


def begin(hosts: Cluster, directory: Path, replicas: int) -> tuple[dict[str, Any], Program, Host]:
    """Start training on the head; return a host that has a shard."""
    about = {
        "steps": 300,
        "size": 20_000,
        "pause_s": 0.03,
        "num_workers": 3,
        "num_shards": 3,
        "save_every": 1000,
        "replicas": replicas,
        "directory": str(directory / "hosts"),
        "options": OPTIONS | {"checkpoint_dir": str(directory / "hosts")},
    }
    program = hosts.python(hosts.hosts[0], "-m", "tests.hosts.train", json.dumps(about))
    shards = program.first("shards")["shards"]
    program.first("step", lambda step: step >= 20)
    return about, program, hosts.host_at(shards[0])


def left(hosts: Cluster, since: float) -> str:
    return " ".join(line.text for line in hosts.logged("^supervisor: ", since=since))


@pytest.mark.parametrize("replicas", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_drained_host_is_empty_and_its_end_costs_nothing(
    replicas: int, hosts: Cluster, tmp_path: Path
) -> None:
    about, program, host = begin(hosts, tmp_path, replicas)
    began = time.time()
    command = ("-m", "distnadam", "drain", host.address, "--timeout", "120")
    drained = hosts.python(hosts.hosts[0], *command)
    drained.finish()
    assert f"{host.address}: is empty" in drained.output, drained.output
    hosts.kill(host, "kill")
    program.first("done")
    program.finish()
    decisions = left(hosts, began)
    assert "HandOver" in decisions, decisions
    assert "Rewind" not in decisions, decisions
    assert digest(tmp_path / "hosts") == train_in_one_process(tmp_path / "alone", about)


def test_an_uncordoned_host_is_used_again_and_the_head_cannot_be_drained(
    hosts: Cluster, tmp_path: Path
) -> None:
    head, second, third = hosts.hosts
    for host in (second, third):
        command = ("-m", "distnadam", "drain", host.address, "--timeout", "60")
        hosts.python(head, *command).finish()
    hosts.python(head, "-m", "distnadam", "uncordon", third.address).finish()
    about = {
        "steps": 5,
        "size": 2000,
        "num_workers": 2,
        "num_shards": 2,
        "directory": str(tmp_path / "hosts"),
        "options": OPTIONS | {"checkpoint_dir": str(tmp_path / "hosts")},
    }
    program = hosts.python(head, "-m", "tests.hosts.train", json.dumps(about))
    assert set(program.first("shards")["shards"]) == {third.address}
    program.first("done")
    program.finish()
    hosts.python(head, "-m", "distnadam", "uncordon", second.address).finish()
    refused = hosts.python(head, "-m", "distnadam", "drain", head.address)
    refused.close()
    assert "runs Ray's head, and the cluster ends with it" in refused.output


@pytest.mark.parametrize("how", ["sigterm", "aws", pytest.param("gcp", marks=pytest.mark.nightly)])
def test_a_notice_that_a_host_goes_away_drains_it(how: str, hosts: Cluster, tmp_path: Path) -> None:
    about, program, host = begin(hosts, tmp_path, 0)
    began = time.time()
    hosts.struck.add(host)
    if how == "sigterm":
        hosts.signal(host, signal.SIGTERM)
    else:
        metadata = hosts.python(host, "-m", "tests.hosts.metadata")
        url = metadata.first("metadata")["metadata"]
        command = ("-m", "distnadam", "notice", "--from", how, "--metadata", url, "--every", "0.5")
        notice = hosts.python(host, *command)
        metadata.tell("announce")
        metadata.first("announced")
        notice.finish()
        assert "are left; the host is being drained" in notice.output, notice.output
        metadata.close()
    program.first("done")
    program.finish()
    decisions = left(hosts, began)
    assert "HandOver" in decisions, decisions
    assert "Rewind" not in decisions, decisions
    assert digest(tmp_path / "hosts") == train_in_one_process(tmp_path / "alone", about)
