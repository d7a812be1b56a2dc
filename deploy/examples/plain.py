"""Workers as plain processes, which Ray did not start and which know only an address and a name.

Run on hosts of the cluster, with its token and RAY_ADDRESS=<the head's address>:6379, first

    python3 plain.py build shared

which leaves the optimizer running, and then for each rank, on any host,

    python3 plain.py train shared <rank>
"""

import sys
from typing import Any

import numpy as np

from distnadam import DistNadam
from distnadam.errors import Rewound

WORKERS, ROUNDS = 2, 50


def build(name: str) -> None:
    """Start a named optimizer, which outlives this process."""
    DistNadam(lr=0.1, num_shards=2, num_workers=WORKERS, name=name, backend="ray").build(
        {"w": np.ones(5000, np.float32)}
    )
    print(f"{name} is running")


def train(name: str, rank: int) -> None:
    """Train as one rank."""
    with DistNadam.connect(name) as optimizer, optimizer.worker(rank) as worker:
        params: Any = worker.pull()
        while worker.round < ROUNDS:
            try:
                params = worker.step({"w": params["w"] - rank})
            except Rewound:
                params = worker.pull()
        print(f"rank {rank} ends with {float(params['w'][0]):.6f} after {worker.round} rounds")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", name]:
            build(name)
        case ["train", name, rank]:
            train(name, int(rank))
        case _:
            raise SystemExit(__doc__)
