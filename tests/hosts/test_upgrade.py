"""`cluster.sh upgrade`: a run goes on with another version from where it stopped; with the one that
it has, where the other cannot be had.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distnadam.cli import main
from tests.hosts.installed import InstalledHosts, wheel
from tests.hosts.network import Network, why_not
from tests.hosts.tasks import digest

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

TRAIN = "distnadam-train.service"
PATIENCE_S = 200.0
ARGUMENTS = "digits --workers 2 --shards 2 --port-range 7000 7063 --save-every 20 --quiet"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[InstalledHosts]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Network(tmp_path) as network:
        yield InstalledHosts(tmp_path, network, 3)


def newest(runs: Path) -> int:
    """Return the step of the newest checkpoint that is complete."""
    steps = [int(path.parent.name.removeprefix("step_")) for path in runs.glob("step_*/manifest*")]
    return max(steps, default=0)


def saved_beyond(hosts: InstalledHosts, runs: Path, step: int) -> int:
    """Wait until the run has saved a later step."""
    deadline = time.monotonic() + PATIENCE_S
    while newest(runs) <= step:
        assert time.monotonic() < deadline, hosts.on(
            hosts.hosts[0], "cat", f"/var/lib/units/{TRAIN}.log"
        )
        time.sleep(0.2)
    return newest(runs)


def versions(hosts: InstalledHosts) -> set[str]:
    """Return the version on each host."""
    ask = "from importlib.metadata import version; print(version('distnadam'))"
    return {hosts.on(host, "/opt/distnadam/venv/bin/python", "-c", ask) for host in hosts.hosts}


def succeeds(done: "subprocess.CompletedProcess[str]") -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_goes_on_with_the_next_version_and_none_that_cannot_be_had_ends_it(
    hosts: InstalledHosts, tmp_path: Path
) -> None:
    head, runs = hosts.hosts[0], tmp_path / "runs"
    succeeds(hosts.cluster("install", wheel(tmp_path, "0.1.0")))
    succeeds(hosts.cluster("start"))
    words = f"TRAIN_ARGUMENTS={ARGUMENTS} --steps 1000000 --checkpoint-dir {runs}"
    hosts.on(head, "sed", "-i", f"s|^TRAIN_ARGUMENTS=.*|{words}|", "/etc/distnadam/train.env")
    hosts.on(head, "systemctl", "start", TRAIN)
    before = saved_beyond(hosts, runs, 0)

    cut = tmp_path / "distnadam-0.2.0-py3-none-any.whl"
    cut.write_bytes(wheel(tmp_path, "0.1.1").read_bytes()[:-1000])
    refused = hosts.cluster("upgrade", cut)
    assert refused.returncode == 1
    assert f"it cannot be installed on {head.address}" in refused.stderr
    assert hosts.on(head, "systemctl", "is-active", TRAIN) == "active"

    broken = hosts.cluster("upgrade", wheel(tmp_path, "0.3.0", importable=False))
    assert broken.returncode == 1
    assert "going back to the version before" in broken.stderr
    assert versions(hosts) == {"0.1.0"}
    before = saved_beyond(hosts, runs, max(before, newest(runs)))

    succeeds(hosts.cluster("upgrade", wheel(tmp_path, "0.4.0")))
    assert versions(hosts) == {"0.4.0"}
    saved_beyond(hosts, runs, max(before, newest(runs)))
    hosts.on(head, "systemctl", "stop", TRAIN)
    alone = tmp_path / "alone"
    steps = ("--steps", str(newest(runs)), "--local", "--checkpoint-dir", str(alone))
    main.main([*("train", "digits", "--workers", "2", "--quiet"), *steps], standalone_mode=False)
    assert digest(runs) == digest(alone)
