"""Workers as Ray actors: `RAY_ADDRESS=<the head's address>:6379 python3 actors.py`.

An actor keeps its data from one call to the next. If it dies, a new one takes its rank over, and
the waiting ranks continue as soon as that one has pushed.
"""

from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from distnadam import DistNadam
from distnadam.errors import Rewound

WORKERS, ROUNDS, EPOCH = 2, 60, 20


@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
class Trainer:
    """One rank, with data of its own."""

    def __init__(self, optimizer: DistNadam, rank: int) -> None:
        self._worker = optimizer.worker(rank)
        self._data = np.random.default_rng(rank).standard_normal((ROUNDS, 5000), dtype=np.float32)

    def train(self, rounds: int) -> float:
        """Train until `rounds` rounds are decided, and return a parameter."""
        params: Any = self._worker.pull()
        while (step := self._worker.round) < rounds:
            try:
                params = self._worker.step({"w": params["w"] - self._data[step]})
            except Rewound:
                # a shard died, and all shards went back to the last checkpoint
                params = self._worker.pull()
        return float(params["w"][0])


def main() -> None:
    """Train with all ranks, replacing those that die."""
    with DistNadam(lr=0.1, num_shards=2, num_workers=WORKERS, backend="ray").build(
        {"w": np.ones(5000, np.float32)}
    ) as optimizer:
        trainers = [Trainer.remote(optimizer, rank) for rank in range(WORKERS)]
        for rounds in range(EPOCH, ROUNDS + 1, EPOCH):
            waiting = {trainer.train.remote(rounds): rank for rank, trainer in enumerate(trainers)}
            ends = set()
            while waiting:
                (ref,), _ = ray.wait(list(waiting))
                rank = waiting.pop(ref)
                try:
                    ends.add(ray.get(ref))
                except RayActorError:
                    trainers[rank] = Trainer.remote(optimizer, rank)
                    waiting[trainers[rank].train.remote(rounds)] = rank
            print(f"{optimizer.iterations} steps, every rank is at {sorted(ends)}")


if __name__ == "__main__":
    main()
