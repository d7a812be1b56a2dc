"""distnadam under a backward pass of torch over hosts: gradients leave as they are yielded.

Says what `ours_on_hosts` does.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.contenders.mlp import WIDTH, loss_of, make
from benchmarks.contenders.rounds import report
from distnadam import DistNadam, Options


@ray.remote(num_cpus=1)
class Trainer:
    def __init__(self, optimizer: DistNadam, rank: int, about: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.worker = optimizer.worker(rank)
        self.model = make(about["elements"])
        self.batch = torch.randn(about["batch"], WIDTH)
        for name, parameter in self.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def push(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self.worker.push_tensor(name, parameter.grad.numpy())
            parameter.grad = None

        return push

    def run(self, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            loss_of(self.model, self.batch).backward()
            stepped = self.worker.step()
            for name, parameter in self.model.named_parameters():
                np.copyto(parameter.detach().numpy(), stepped[name])
            times.append(time.perf_counter() - began)
        return times


def main(about: dict[str, Any]) -> None:
    assert (about["workers"], about["sums"], about["dtype"]) == (1, False, None)
    ray.init(address="auto", log_to_driver=False)
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    params = {n: p.detach().numpy() for n, p in make(about["elements"]).named_parameters()}
    with DistNadam(
        num_shards=about["hosts"],
        num_workers=about["hosts"],
        backend="ray",
        options=Options(shard_resources={"shard": 1}, transport=about["transport"]),
    ).build(params) as optimizer:
        trainers = [
            Trainer.options(  # type: ignore[attr-defined]
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(optimizer, rank, about)
            for rank, node in enumerate(nodes)
        ]

        def run(steps: int) -> list[float]:
            times: list[list[float]] = ray.get([each.run.remote(steps) for each in trainers])
            return times[0]

        report(run, about)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
