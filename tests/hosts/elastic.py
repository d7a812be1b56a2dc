"""`python -m tests.hosts.elastic JSON`: one rank of a named optimizer, which rank 0 builds.

Every rank pushes the same gradients, so that the bits do not depend on who takes part.
"""

import json
import sys
import time
from typing import Any

import numpy as np

from distnadam import DistNadam, Options
from distnadam.errors import NotRunning
from tests.hosts.program import say
from tests.hosts.tasks import digest_of
from tests.hosts.train import hosts_of

_SIZE = 50_000


def gradient(step: int) -> Any:
    """Return gradients whose sum over some ranks is exact."""
    return {"w": np.random.default_rng(step).integers(-8, 8, _SIZE).astype(np.float32)}


def initial() -> Any:
    """Return the parameters at the beginning."""
    return {"w": np.linspace(-1, 1, _SIZE, dtype=np.float32)}


def expected(steps: int) -> dict[str, str]:
    """Return the bits after these steps of one worker, here."""
    with DistNadam(backend="local").build(initial()) as optimizer:
        with optimizer.worker(0) as worker:
            for step in range(steps):
                worker.step(gradient(step))
        return digest_of(optimizer)


def main(about: dict[str, Any]) -> None:
    """Run the command."""
    rank, steps = about["rank"], about["steps"]
    if rank == 0:
        optimizer = DistNadam(
            num_workers=about["num_workers"],
            backend="ray",
            name=about["name"],
            options=Options(**about["options"]),
        ).build(initial())
        say(shards=hosts_of(optimizer.shards.backend))
    else:
        optimizer = _connected(about["name"])
    with optimizer.worker(rank) as worker:
        for step in range(steps):
            worker.step(gradient(step))
            say(step=step + 1)
            time.sleep(about["pause_s"])
    if rank == 0:
        sys.stdin.readline()  # the other ranks have left
        say(digest=digest_of(optimizer))
        optimizer.close()


def _connected(name: str) -> DistNadam:
    while True:
        try:
            return DistNadam.connect(name)
        except NotRunning:
            time.sleep(0.1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
