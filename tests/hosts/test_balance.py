"""A host with a slow cable, or with part of a CPU, is named, and given less of the state."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.network import Host
from tests.hosts.program import Program
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RESOURCES = [{"CPU": 1}, *[{"CPU": 1, "shard": 2}] * 2, {"CPU": 0, "shard": 2}]
"""The last host has no room for a rank; the head, with one, none for a shard."""
OPTIONS = {"shard_resources": {"shard": 1}, "worker_cpus": 1.0, "shard_timeout_s": 20.0}
_CGROUPS = Path("/sys/fs/cgroup/cpu")
_QUOTA_US = 1000
"""The least that is allowed: the shorter it is, the more a host is as one of a slower CPU."""
_LOOKS = 10


def begin(hosts: Cluster, directory: Path, size: int) -> tuple[dict[str, Any], Program, list[str]]:
    """Start training without an end; return where its shards are."""
    about = {
        "steps": 100_000,
        "size": size,
        "num_workers": 3,
        "num_shards": 3,
        "save_every": 100_000,
        "name": "balanced",
        "ends": str(directory / "ends"),
        "directory": str(directory / "hosts"),
        "options": OPTIONS | {"checkpoint_dir": str(directory / "hosts")},
    }
    program = hosts.python(hosts.hosts[0], "-m", "tests.hosts.train", json.dumps(about))
    shards = program.first("shards")["shards"]
    program.first("step", lambda step: step >= 5)
    return about, program, shards


def ask(hosts: Cluster, *command: str) -> str:
    """Give a command on the head; return what it prints."""
    program = hosts.python(hosts.hosts[0], "-m", "distnadam", *command)
    program.finish()
    return program.output


def paces(hosts: Cluster) -> list[dict[str, Any]]:
    """Return what each host has done, from a status."""
    for _ in range(_LOOKS):
        status = json.loads(ask(hosts, "status", "balanced", "--json").splitlines()[-1])
        if status["paces"]:
            found: list[dict[str, Any]] = status["paces"]
            return found
    raise AssertionError("no round was decided between two looks")


def held(hosts: Cluster) -> dict[str, int]:
    """Return the elements that each host holds."""
    return {each["host"]: each["elements"] for each in paces(hosts)}


def slowest_s(hosts: Cluster) -> float:
    """Return the seconds in which the slowest host steps what it holds, the median of looks."""
    looks = [[e["elements"] * (e["step_s"] or 0.0) for e in paces(hosts)] for _ in range(3)]
    return sorted(map(max, looks))[1]


def named(hosts: Cluster, host: Host, what: str) -> str:
    """Look until a status names a host; return it."""
    said = ""
    for _ in range(_LOOKS):
        said = ask(hosts, "status", "balanced")
        if f"{host.address} is slow: its {what}" in said:
            return said
        time.sleep(0.5)
    raise AssertionError(said)


@contextlib.contextmanager
def part_of_a_cpu(host: Host, part: float) -> Iterator[None]:
    """Let all processes of a host together have a part of one CPU."""
    group = _CGROUPS / f"distnadam-test-{host.number}"
    if not (_CGROUPS / "cpu.cfs_quota_us").exists() and not (_CGROUPS / "tasks").exists():
        pytest.skip("no cgroups of version 1 with the controller of CPUs")
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(int(_QUOTA_US / part)))
        (group / "cpu.cfs_quota_us").write_text(str(_QUOTA_US))
        space = Path(f"/proc/{host.holder}/ns/net").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns/net").readlink() == space:
                    (group / "cgroup.procs").write_text(process.name)
        yield
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (_CGROUPS / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            group.rmdir()


def finish(about: dict[str, Any], program: Program, directory: Path) -> None:
    """End the run, and compare its bits with those of one process and one shard."""
    Path(about["ends"]).touch()
    program.first("done")
    program.finish()
    newest = max(path.name for path in (directory / "hosts").glob("step_*"))
    alone = {**about, "steps": int(newest.removeprefix("step_")), "name": None}
    del alone["ends"]
    assert digest(directory / "hosts") == train_in_one_process(directory / "alone", alone)


def test_a_host_with_a_slow_cable_is_named_and_moves_fewer_bytes_once_balanced(
    hosts: Cluster, tmp_path: Path
) -> None:
    about, program, shards = begin(hosts, tmp_path, 300_000)
    slow = hosts.hosts[-1]
    assert slow.address in shards
    slow.shape(40e6)
    try:
        said = named(hosts, slow, "cable")
        assert "ms of each step (" in said
        before = held(hosts)
        tried = ask(hosts, "reshard", "balanced", "--balance", "--dry-run", "--over", "4")
        assert "times as short" in tried and held(hosts) == before, tried
        done = ask(hosts, "reshard", "balanced", "--balance", "--over", "4")
        assert "3 shard(s) by what their hosts can do" in done, done
        after = held(hosts)
        # what crosses its cable is what its shards hold, since it has no ranks
        assert after[slow.address] < 0.5 * before[slow.address], (before, after, done)
        assert sum(after.values()) == about["size"]
    finally:
        slow.unshape()
    finish(about, program, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("part", [0.1])
def test_a_host_with_part_of_a_cpu_is_named_and_steps_less_once_balanced(
    part: float, hosts: Cluster, tmp_path: Path
) -> None:
    about, program, shards = begin(hosts, tmp_path, 3_000_000)
    slow = hosts.hosts[-1]
    assert slow.address in shards
    with part_of_a_cpu(slow, part):
        said = named(hosts, slow, "CPU")
        assert "ms of each step (" in said
        before, long_s = held(hosts), slowest_s(hosts)
        done = ask(hosts, "reshard", "balanced", "--balance", "--over", "6")
        assert "3 shard(s) by what their hosts can do" in done, done
        after = held(hosts)
        assert after[slow.address] < 0.8 * before[slow.address], (before, after, done)
        assert slowest_s(hosts) < long_s, "what all wait for takes less time"
    finish(about, program, tmp_path)
