"""Convergence beside the peers: the built-in torch tasks, the same seeds and batches of two ranks,
by distnadam on Ray, by torch's NAdam and AdamW in one process, and by DDP with NAdam in two.

    .venv-bench/bin/python -m benchmarks.convergence [--hosts]

With `--hosts` there are three ranks, and distnadam and DDP run on three hosts too, with cables of 1
Gbit/s: network namespaces of this machine, whose cores they share. That needs root.

A final loss is the mean of a run's last 50 steps. Seconds are those of the steps, from the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tests.hosts.cluster import Cluster
from tests.hosts.network import why_not

TASKS = ("digits-torch", "charlm")
ON_HOSTS = " on hosts"
CONTENDERS = {
    "distnadam": "distnadam, one host",
    "nadam": "torch NAdam, one process",
    "adamw": "torch AdamW, one process",
    "ddp": "DDP + NAdam, one host",
    "distnadam on hosts": "distnadam, three hosts",
    "ddp on hosts": "DDP + NAdam, three hosts",
}
HOSTS = 3
BITS_PER_S = 1e9
PATIENCE_S = 1200.0
LAST = 50
PROGRAM = ("-m", "benchmarks.contenders.converge")
Run = dict[str, Any]
_ports = count(29600)


def run_on_hosts(cluster: Cluster, contender: str, given: list[str]) -> str:
    """Return what the program on the first host has printed."""
    program = (*PROGRAM, contender, *given, "--on-hosts")
    hosts = cluster.hosts if contender == "ddp" else cluster.hosts[:1]
    env = {
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(next(_ports)),
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    programs = [cluster.python(host, *program, RANK=str(r), **env) for r, host in enumerate(hosts)]
    printed = {host: each.finish(PATIENCE_S) for host, each in zip(hosts, programs, strict=True)}
    return printed[hosts[0]]


def run(
    contender: str, task: str, seed: int, steps: int, workers: int, cluster: Cluster | None
) -> Run:
    about = {"contender": contender, "task": task, "seed": seed}
    given = [task, "--seed", str(seed), "--steps", str(steps), "--workers", str(workers)]
    if contender.endswith(ON_HOSTS):
        assert cluster is not None
        printed = run_on_hosts(cluster, contender.removesuffix(ON_HOSTS), given)
        return about | next(json.loads(li) for li in printed.splitlines() if '"losses"' in li)
    command = [sys.executable, *PROGRAM, contender, *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{contender} {' '.join(given)} failed:\n{done.stderr[-3000:]}")
    return about | json.loads(done.stdout.splitlines()[-1])


def final(found: Run) -> float:
    return statistics.fmean(found["losses"][-LAST:])


def smoothed(losses: list[float]) -> Any:
    """The mean of the last 25 losses at each step, of fewer at the first."""
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    begins = np.maximum(0, ends - 25)
    return (sums[ends] - sums[begins]) / (ends - begins)


def seconds_to(found: Run, target: float) -> float:
    """Seconds until the smoothed loss was first at most `target`; NaN if never."""
    reached = np.flatnonzero(smoothed(found["losses"]) <= target)
    return float(found["seconds"][reached[0]]) if len(reached) else float("nan")


def summary(runs: list[Run], task: str) -> list[dict[str, Any]]:
    """Return a row for each contender: finals, distance from torch's NAdam, and time to
    the loss that all reach.
    """
    of = {c: [r for r in runs if r["task"] == task and r["contender"] == c] for c in CONTENDERS}
    of = {contender: found for contender, found in of.items() if found}
    target = max(min(smoothed(r["losses"])) for found in of.values() for r in found)
    rows = []
    for contender, found in of.items():
        finals = [final(r) for r in found]
        metric = next(iter(found[0]["metrics"]))
        row = {
            "task": task,
            "contender": CONTENDERS[contender],
            "final": statistics.fmean(finals),
            "least": min(finals),
            "most": max(finals),
            "metric": metric,
            "value": statistics.fmean(r["metrics"][metric] for r in found),
            "target": target,
            "seconds": statistics.median(seconds_to(r, target) for r in found),
        }
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]], console: Console) -> None:
    title = f"{rows[0]['task']}: loss of the last {LAST} steps, {rows[0]['metric']}"
    table = Table("", "final", "seeds", rows[0]["metric"], "s to the loss", title=title)
    for row in rows:
        spread = f"{row['least']:.4f} to {row['most']:.4f}"
        value, seconds = f"{row['value']:.4f}", f"{row['seconds']:.1f}"
        table.add_row(row["contender"], f"{row['final']:.4f}", spread, value, seconds)
    console.print(table)
    by_name = {row["contender"]: row for row in rows}
    ours, theirs = by_name.get(CONTENDERS["distnadam"]), by_name.get(CONTENDERS["nadam"])
    if ours and theirs:
        apart, spread = abs(ours["final"] - theirs["final"]), theirs["most"] - theirs["least"]
        word = "within" if apart <= spread else "BEYOND"
        console.print(
            f"distnadam's mean final is {apart:.5f} from torch NAdam's, {word} the {spread:.5f} "
            f"between its seeds; the loss that all reach is {ours['target']:.4f}"
        )


def draw(runs: list[Run], path: Path) -> None:
    """Draw each contender's smoothed loss over the steps, and over the seconds."""
    tasks = list(dict.fromkeys(r["task"] for r in runs))
    figure = Figure(figsize=(12, 4 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for contender, name in CONTENDERS.items():
            found = [r for r in runs if r["task"] == task and r["contender"] == contender]
            for number, each in enumerate(found):
                line = smoothed(each["losses"])
                label = name if number == 0 else None
                color = f"C{list(CONTENDERS).index(contender)}"
                row[0].semilogy(line, label=label, color=color, linewidth=1, alpha=0.7)
                row[1].semilogy(each["seconds"], line, color=color, linewidth=1, alpha=0.7)
        row[0].set(title=task, xlabel="step", ylabel="loss")
        row[1].set(title=task, xlabel="seconds")
        row[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS)
    parser.add_argument("--hosts", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    if args.hosts and (reason := why_not()) is not None:
        raise SystemExit(reason)
    able = [name for name in CONTENDERS if args.hosts or not name.endswith(ON_HOSTS)]
    contenders = [name for name in args.contenders or able if name in able]
    with ExitStack() as stack:
        cluster = None
        if args.hosts:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            cluster = Cluster(Path(directory), [{"CPU": 1.0, "shard": 1.0}] * HOSTS)
            stack.enter_context(cluster)
            for host in cluster.hosts:
                host.shape(BITS_PER_S)
        runs = [
            run(contender, task, seed, args.steps, HOSTS if args.hosts else 2, cluster)
            for task in args.tasks
            for seed in range(args.seeds)
            for contender in contenders  # in turn, so that slow periods affect all
        ]
    rows = {task: summary(runs, task) for task in args.tasks}
    for task in args.tasks:
        report(rows[task], Console(width=110))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "convergence.json").write_text(json.dumps({"summary": rows, "runs": runs}))
    draw(runs, args.out / "convergence.png")
    print(f"written: {args.out / 'convergence.json'}, {args.out / 'convergence.png'}")


if __name__ == "__main__":
    main()
