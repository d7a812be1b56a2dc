"""distnadam over hosts, a shard on each: says "warm", and at a line of input the median step."""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import ray

from distnadam import DistNadam, Options
from tests.hosts.program import say


@ray.remote(num_cpus=1)
class Trainer:
    def __init__(self, optimizer: DistNadam, rank: int) -> None:
        self.worker = optimizer.worker(rank)
        rng = np.random.default_rng(rank)
        for view in self.worker.gradients().values():
            rng.standard_normal(out=view, dtype=np.float32)

    def node(self) -> str:
        found: str = ray.get_runtime_context().get_node_id()
        return found

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
    options = Options(shard_resources={"shard": 1}, transport=about["transport"])
    with DistNadam(num_shards=hosts, num_workers=workers, backend="ray", options=options).build(
        {"w": np.zeros(about["elements"], np.float32)}
    ) as optimizer:
        trainers = [Trainer.remote(optimizer, rank) for rank in range(workers)]  # type: ignore[attr-defined]
        nodes = set(ray.get([trainer.node.remote() for trainer in trainers]))
        assert len(nodes) == hosts, "a host has no worker"
        ray.get([trainer.run.remote(about["warm_up"]) for trainer in trainers])
        say(warm=True)
        sys.stdin.readline()
        times = ray.get([trainer.run.remote(about["steps"]) for trainer in trainers])
        say(median_s=statistics.median(times[0]))
        sys.stdin.readline()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
