"""Workers of Ray Train, which starts a function per rank; each finds the optimizer by its name.

    pip install "ray[train]"
    RAY_ADDRESS=<the head's address>:6379 python3 train_function.py <results>

`<results>` is a directory that every host shares, for Ray Train's own records.
"""

import sys
from typing import Any

import numpy as np
import ray
import ray.train

# or ray.train.torch.TorchTrainer, which is one
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from distnadam import DistNadam
from distnadam.errors import Rewound

WORKERS, ROUNDS = 2, 50


def train(config: dict[str, Any]) -> None:
    """Train as one rank of Ray Train."""
    rank = ray.train.get_context().get_world_rank()
    with DistNadam.connect(config["name"]) as optimizer, optimizer.worker(rank) as worker:
        params: Any = worker.pull()
        while worker.round < ROUNDS:
            try:
                params = worker.step({"w": params["w"] - rank})
            except Rewound:
                params = worker.pull()


def main(results: str) -> None:
    """Build the optimizer, and have Ray Train train it."""
    with DistNadam(lr=0.1, num_workers=WORKERS, num_shards=2, name="trained", backend="ray").build(
        {"w": np.ones(5000, np.float32)}
    ) as optimizer:
        trainer = DataParallelTrainer(
            train,
            train_loop_config={"name": "trained"},
            scaling_config=ray.train.ScalingConfig(num_workers=WORKERS),
            run_config=ray.train.RunConfig(name="example", storage_path=results),
        )
        trainer.fit()
        print(
            f"{optimizer.iterations} steps, a parameter is "
            f"{float(optimizer.get_params()['w'][0]):.6f}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
