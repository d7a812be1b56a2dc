"""The cost of exporting metrics: steps with and without, in turn, in the same worker processes.

`python -m benchmarks.metrics`, in an environment with the extra `metrics`. The arms take turns at
every step, in random order, so that the machine's other load falls on all alike; a second optimizer
without metrics shows how much noise remains. Background work falls on all arms too, so its CPU time
is read separately: of the exporter's thread in a worker, and of all of Ray's agent.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from distnadam import DistNadam, Options
from distnadam.extras import how_to_install

ARMS = {"off": False, "off again": False, "on": True}


@ray.remote(num_cpus=0)
class Trainer:
    """One rank of every arm's optimizer."""

    def __init__(self, optimizers: dict[str, DistNadam], rank: int) -> None:
        self.workers = {arm: optimizer.worker(rank) for arm, optimizer in optimizers.items()}
        for worker in self.workers.values():
            for view in worker.gradients().values():
                np.random.default_rng(rank).standard_normal(out=view, dtype=np.float32)

    def run(self, steps: int, seed: int) -> dict[str, list[float]]:
        """Return the seconds of each of an arm's steps, by arm."""
        order, times = random.Random(seed), dict[str, list[float]]({arm: [] for arm in ARMS})
        for _ in range(steps):
            for arm in order.sample(list(ARMS), len(ARMS)):
                began = time.perf_counter()
                self.workers[arm].step()
                times[arm].append(time.perf_counter() - began)
        return times

    def exporting_s(self) -> float:
        """Return the CPU seconds that this process has spent on exporting."""
        clocks = [
            time.pthread_getcpuclockid(thread.ident)
            for thread in threading.enumerate()
            if thread.name == "metrics"
        ]
        return sum(map(time.clock_gettime, clocks))


def agent_s() -> float:
    """Return the CPU seconds that the agent of this Ray has spent."""
    session = ray._private.worker._global_node.get_session_dir_path()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_text()
            if "dashboard/agent.py" in command and session in command:
                user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
                return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError("this Ray has no agent")


def measure(elements: int, seconds: float) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the seconds of each of an arm's steps, by arm, and the share of a core in background.

    The latter is by thread or process: "exporter" and "agent".
    """
    params = {"w": np.zeros(elements, np.float32)}
    optimizers = {
        arm: DistNadam(
            num_shards=2, num_workers=2, backend="ray", options=Options(metrics=on)
        ).build(params)
        for arm, on in ARMS.items()
    }
    trainers = [Trainer.remote(optimizers, rank) for rank in range(2)]
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    steps, began, spent = 50, 0.0, dict[str, float]()
    for number in itertools.count(-1):
        if number == 0:
            began = time.monotonic()
            spent = {"exporter": ray.get(trainers[0].exporting_s.remote()), "agent": agent_s()}
        found = ray.get([trainer.run.remote(steps, number) for trainer in trainers])[0]
        if number >= 0:  # the first is warm-up
            for arm in ARMS:
                times[arm] += found[arm]
            if time.monotonic() - began > seconds:
                break
        steps = max(10, int(2.0 / sum(map(statistics.median, found.values()))))
    elapsed = time.monotonic() - began
    now = {"exporter": ray.get(trainers[0].exporting_s.remote()), "agent": agent_s()}
    for optimizer in optimizers.values():
        optimizer.close()
    return {arm: np.array(each) for arm, each in times.items()}, {
        who: (now[who] - spent[who]) / elapsed for who in now
    }


def over_off(times: dict[str, np.ndarray], arm: str) -> tuple[float, float, float]:
    """Return the median ratio of an arm's steps to the "off" steps, and its 95% interval.

    The interval is a bootstrap over fifty pieces of the run, since neighbouring steps correlate.
    """
    pieces = np.array_split(times[arm] / times["off"], 50)
    draws = np.random.default_rng(0).integers(0, len(pieces), (1000, len(pieces)))
    drawn = sorted(float(np.median(np.concatenate([pieces[i] for i in draw]))) for draw in draws)
    return float(np.median(np.concatenate(pieces))), drawn[25], drawn[974]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--elements", type=lambda text: int(float(text)), nargs="*", default=[10**4, 10**6]
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="about so long for each size")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    if ray.nodes()[0]["MetricsExportPort"] <= 0:
        parser.error(f"Ray's metrics are off here: {how_to_install('metrics')}")
    table = Table(
        "elements",
        "arm",
        "steps",
        "ms",
        "over off",
        "95% interval",
        title="one step, 2 workers, 2 shards, views",
    )
    rows: list[dict[str, Any]] = []
    lines = []
    for elements in args.elements:
        times, background = measure(elements, args.seconds)
        for arm in ARMS:
            ratio, low, high = over_off(times, arm)
            rows.append(
                {
                    "elements": elements,
                    "arm": arm,
                    "ms": float(np.median(times[arm])) * 1e3,
                    "ratio": ratio,
                    "interval": [low, high],
                }
            )
            table.add_row(
                f"{elements:.0e}",
                arm,
                str(len(times[arm])),
                f"{rows[-1]['ms']:.3f}",
                f"{ratio:.4f}",
                f"{low:.4f} to {high:.4f}",
            )
        rows.append({"elements": elements, "background": background})
        lines.append(
            f"{elements:.0e}: in the background, of one core: "
            + ", ".join(f"{who} {part:.2%}" for who, part in background.items())
        )
    ray.shutdown()
    Console(width=110).print(table, *lines, sep="\n")
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
