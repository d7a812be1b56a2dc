"""Workers as Ray tasks: `RAY_ADDRESS=<the head's address>:6379 python3 tasks.py`.

Ray runs a task again if its process or host dies; the new one takes the rank over and continues at
the present round.
"""

from typing import Any

import numpy as np
import ray

from distnadam import DistNadam
from distnadam.errors import Rewound

WORKERS, ROUNDS = 2, 50


@ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")
def train(optimizer: DistNadam, rank: int) -> float:
    """Train as one rank, and return a parameter."""
    with optimizer.worker(rank) as worker:
        params: Any = worker.pull()
        while worker.round < ROUNDS:
            try:
                # gradients of the loss at `params`, on this rank's batch of this round
                params = worker.step({"w": params["w"] - rank})
            except Rewound:
                params = worker.pull()  # a shard died, and all went back to the last checkpoint
        return float(params["w"][0])


def main() -> None:
    """Train with all ranks, and print the end."""
    with DistNadam(lr=0.1, num_shards=2, num_workers=WORKERS, backend="ray").build(
        {"w": np.ones(5000, np.float32)}
    ) as optimizer:
        ends = ray.get([train.remote(optimizer, rank) for rank in range(WORKERS)])
        print(f"{optimizer.iterations} steps, every rank ends with {sorted(set(ends))}")


if __name__ == "__main__":
    main()
