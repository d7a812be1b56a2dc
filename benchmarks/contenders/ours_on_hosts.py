"""distnadam over hosts, a shard on each: says "warm", and at a line of input the median step.

With `sums`, the gradients of a host's workers are summed before they leave it; `dtype` is that of
gradients and parameters on their way, None for float32.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.contenders.rounds import report
from distnadam import DistNadam, Options


@ray.remote(num_cpus=1)
class Trainer:
    def __init__(self, optimizer: DistNadam, rank: int, dtype: str | None) -> None:
        self.worker = optimizer.worker(rank)
        rng = np.random.default_rng(rank)
        for view in self.worker.gradients(dtype=dtype).values():
            view[:] = rng.standard_normal(view.size, dtype=np.float32)

    def run(self, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            self.worker.step()
            times.append(time.perf_counter() - began)
        return times


def main(about: dict[str, Any]) -> None:
    ray.init(address="auto", log_to_driver=False)
    hosts, workers = about["hosts"], about["hosts"] * about["workers"]
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    assert len(nodes) == hosts
    with DistNadam(
        num_shards=hosts,
        num_workers=workers,
        backend="ray",
        sum_group=about["workers"] if about["sums"] else 1,
        pull_dtype=about["dtype"],
        options=Options(shard_resources={"shard": 1}, transport=about["transport"]),
    ).build({"w": np.zeros(about["elements"], np.float32)}) as optimizer:
        trainers = [
            Trainer.options(  # type: ignore[attr-defined]
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    nodes[rank // about["workers"]], soft=False
                )
            ).remote(optimizer, rank, about["dtype"])
            for rank in range(workers)
        ]

        def run(steps: int) -> list[float]:
            times: list[list[float]] = ray.get([each.run.remote(steps) for each in trainers])
            return times[0]

        report(run, about)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
