"""Injects seeded faults into hosts while `fit` trains, and compares the bits with one process's.

`python -m tests.hosts.chaos --faults N --seed S` exits with 1 on any difference.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from distnadam.checkpoint import store
from tests.hosts.cluster import ALL_ON_ANY, Cluster
from tests.hosts.faults import FAULTS, PORTS, SHARD_TIMEOUT_S, Fault, Rng, Scene
from tests.hosts.network import Host, why_not
from tests.hosts.program import Program
from tests.hosts.tasks import digest
from tests.hosts.train import train_in_one_process

FAULTS_PER_RUN = 6
WORKERS, PAUSE_S = 3, 0.03
SIZES = ({"size": 20_000, "steps": 1400}, {"size": 1_000_000, "steps": 400})
"""The training goes on for longer than the faults of a run last, on a fast machine too, where it
takes PAUSE_S a step while a process that nobody needs stands still.
"""
OPTIONS = {
    "shard_resources": {"shard": 1},
    "worker_cpus": 0.5,
    "shard_timeout_s": SHARD_TIMEOUT_S,
    "start_timeout_s": 120.0,
    "port_range": PORTS,
}
_AT_ONCE_S = 0.05


@dataclass
class Report:
    """The faults, and the seconds from each to the next step, by kind and replicas."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    decisions: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'kind':34} replicas  faults  to the next step, s: median  worst"]
        for (kind, replicas), times in sorted(self.seconds.items()):
            lines.append(
                f"{kind:34} {replicas:8} {len(times):7} {median(times):28.2f} {max(times):6.2f}"
            )
        decided = (
            ", ".join(f"{number} {what}" for what, number in sorted(self.decisions.items()))
            or "nothing"
        )
        lines.append(f"{sum(map(len, self.seconds.values()))} faults; decided: {decided}")
        return "\n".join([*lines, *self.differences])


def play(
    num_faults: int,
    seed: int,
    cluster: Cluster,
    directory: Path,
    kinds: Sequence[Fault] = FAULTS,
) -> Report:
    """Inject so many faults, each kind in turn, a few per run, with and without standbys."""
    rng, report, left = np.random.default_rng(seed), Report(), list[Fault]()
    began, struck, number = time.time(), 0, 0
    while struck < num_faults and not report.differences:
        chosen = []
        for _ in range(min(FAULTS_PER_RUN, num_faults - struck)):
            left = left or [kinds[i] for i in rng.permutation(len(kinds))]
            chosen.append(left.pop())
        print(f"run {number}: {', '.join(fault.name for fault in chosen)}", flush=True)
        try:
            _run(chosen, number, cluster, directory / f"run{number}", rng, report)
        except AssertionError as error:
            report.differences.append(f"FAILED in run {number}: {error}")
        struck, number = struck + len(chosen), number + 1
    for line in cluster.logged("^supervisor: ", since=began):
        report.decisions[line.text.removeprefix("supervisor: ").partition("(")[0]] += 1
    return report


def _run(
    faults: list[Fault], number: int, cluster: Cluster, directory: Path, rng: Rng, report: Report
) -> None:
    replicas = number % 2
    about: dict[str, Any] = {
        **SIZES[number // 2 % 2],
        "pause_s": PAUSE_S,
        "num_workers": WORKERS,
        "num_shards": int(rng.integers(1, 4)),
    }
    about |= {
        "replicas": replicas,
        "save_every": 50,
        "directory": str(directory / "hosts"),
        "options": OPTIONS | {"checkpoint_dir": str(directory / "hosts")},
    }
    about |= {
        "clipnorm": 0.5 if rng.random() < 0.3 else None,
        "name": f"chaos{number}" if rng.random() < 0.5 else None,
    }
    steps: int = about["steps"]
    program = cluster.python(cluster.hosts[0], "-m", "tests.hosts.train", json.dumps(about))
    for index, fault in enumerate(faults):
        reached = steps * (index + 1) // (len(faults) + 1)
        program.first("step", lambda step, reached=reached: step >= reached)
        if replicas:
            program.first("standbys", lambda count: count == about["num_shards"])
        seconds, host = strike(fault, program, cluster, rng, about["size"])
        report.seconds.setdefault((fault.name, replicas), []).append(seconds)
        print(f"  {fault.name}, {host.address}: {seconds:.1f} s", flush=True)
    program.first("done")
    program.finish()
    about |= {"name": None, "replicas": 0, "pause_s": 0.0}
    if digest(directory / "hosts") != train_in_one_process(directory / "alone", about):
        report.differences.append(f"DIFFERENT bits in run {number}")
    if (lost := miscounted(directory / "hosts", steps)) is not None:
        report.differences.append(f"DIFFERENT in run {number}: {lost}")


def strike(
    fault: Fault, program: Program, cluster: Cluster, rng: Rng, size: int
) -> tuple[float, Host]:
    """Strike a host, chosen at random, while a program trains so many parameters; return the
    seconds to the next step, and the host.
    """
    time.sleep(rng.uniform(0, 0.3))
    host = cluster.hosts[int(rng.integers(0 if fault.head_too else 1, len(cluster.hosts)))]
    scene = Scene(
        cluster=cluster,
        host=host,
        go_on=partial(next_step, program, time.time()),
        rng=rng,
        model_bytes=4 * size,
    )
    return fault.strike(scene), host


def miscounted(directory: Path, steps: int) -> str | None:
    """Return what is wrong if a push of these steps is lost or counted twice."""
    _, manifest, _ = store.find(str(directory))
    runs = manifest.ledger["runs"]
    counted = Counter(
        (rank, each) for rank, _, first, last in runs for each in range(first, last + 1)
    )
    if counted == Counter((rank, each) for rank in range(WORKERS) for each in range(1, steps + 1)):
        return None
    return f"a push is lost or counted twice: {runs}"


def next_step(program: Program, moment: float) -> float:
    """Wait until `fit` reports a step that began after a moment; return the seconds since.

    It reports several steps at once, at a segment's end: the first ones after the moment may be
    from before.
    """
    since = moment
    for _ in range(2):
        since = program.first(
            "time", lambda when, since=since: when > since + _AT_ONCE_S, also="step"
        )["time"]
    return float(since) - moment


def on_hosts(played: Callable[[Cluster, Path], Any]) -> int:
    """Play on hosts made for it, and print the report; return the command's exit status."""
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    directory = Path(tempfile.mkdtemp(prefix="hosts-"))
    print(f"in {directory}, which stays if anything is wrong", flush=True)
    with Cluster(directory, ALL_ON_ANY) as cluster, cluster.restarting_nodes():
        report = played(cluster, directory)
    print(report)
    if report.differences:
        return 1
    shutil.rmtree(directory)
    return 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    return on_hosts(partial(play, asked.faults, asked.seed))


if __name__ == "__main__":
    raise SystemExit(main())
