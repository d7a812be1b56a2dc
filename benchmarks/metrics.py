"""What exporting metrics costs: the same step with and without, in turn, in the same worker processes on one Ray whose metrics are on.

`python -m benchmarks.metrics`, in an environment with the extra `metrics`. A second optimizer without shows what the machine's noise
makes of two that are the same. The cost includes the exporters' threads and Ray's own agent, which work on the same cores.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from distnadam import DistNadam, Options

ARMS = {"off": False, "off again": False, "on": True}


@ray.remote(num_cpus=0)
class Trainer:
    """One rank of every arm's optimizer."""

    def __init__(self, optimizers: dict[str, DistNadam], rank: int) -> None:
        self.workers = {arm: optimizer.worker(rank) for arm, optimizer in optimizers.items()}
        for worker in self.workers.values():
            for view in worker.gradients().values():
                np.random.default_rng(rank).standard_normal(out=view, dtype=np.float32)

    def run(self, arm: str, steps: int) -> float:
        """Return the median seconds of a step."""
        worker, times = self.workers[arm], []
        for _ in range(steps):
            began = time.perf_counter()
            worker.step()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def measure(elements: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return each arm's medians, one per round; within a round the arms come in an order that changes from round to round."""
    params = {"w": np.zeros(elements, np.float32)}
    optimizers = {
        arm: DistNadam(num_shards=2, num_workers=2, backend="ray", options=Options(metrics=on)).build(params) for arm, on in ARMS.items()
    }
    trainers = [Trainer.remote(optimizers, rank) for rank in range(2)]
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(-1, rounds):
        arms = list(ARMS)[number % 3 :] + list(ARMS)[: number % 3]
        for arm in arms if number % 2 else reversed(arms):
            found = ray.get([trainer.run.remote(arm, steps) for trainer in trainers])
            if number >= 0:  # the first is warm-up
                times[arm].append(found[0])
    for optimizer in optimizers.values():
        optimizer.close()
    return times


def ratios(times: dict[str, list[float]], arm: str) -> list[float]:
    """Return, per round, an arm's step over that of the arm without metrics, sorted."""
    return sorted(mine / other for mine, other in zip(times[arm], times["off"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), nargs="*", default=[10**4, 10**6])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.5, help="about so long is each arm's turn")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    if ray.nodes()[0]["MetricsExportPort"] <= 0:
        parser.error("Ray's metrics are off here: pip install 'distnadam[metrics]'")
    table = Table("elements", "arm", "ms", "over off: median", "quartiles", title="one step, 2 workers, 2 shards, views")
    rows: list[dict[str, Any]] = []
    for elements in args.elements:
        once = statistics.median(measure(elements, 1, 50)["off"])
        times = measure(elements, args.rounds, max(20, int(args.seconds / once)))
        for arm in ARMS:
            found = ratios(times, arm)
            low, middle, high = found[len(found) // 4], statistics.median(found), found[3 * len(found) // 4]
            rows.append(
                {"elements": elements, "arm": arm, "ms": statistics.median(times[arm]) * 1e3, "ratio": middle, "quartiles": [low, high]}
            )
            table.add_row(f"{elements:.0e}", arm, f"{rows[-1]['ms']:.3f}", f"{middle:.4f}", f"{low:.4f} to {high:.4f}")
    ray.shutdown()
    Console(width=110).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
