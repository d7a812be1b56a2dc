"""`python -m tests.hosts.stepping JSON`: one worker steps remote shards and prints the duration.

After some steps of warm-up it prints "warm", and goes on at the next line of standard input.
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from distnadam import DistNadam, Options
from tests.hosts.program import say

_WARM_UP = 3


def main(about: dict[str, Any]) -> None:
    """Run the command."""
    options = Options(shard_resources={"away": 1})
    initial = {"w": np.zeros(about["size"], np.float32)}
    with (
        DistNadam(num_shards=about["num_shards"], backend="ray", options=options).build(
            initial
        ) as optimizer,
        optimizer.worker(0) as worker,
    ):
        gradient = np.random.default_rng(0).standard_normal(about["size"], dtype=np.float32)
        for _ in range(_WARM_UP):
            worker.step({"w": gradient})
        say(warm=True)
        sys.stdin.readline()
        times = []
        for _ in range(about["steps"]):
            began = time.perf_counter()
            worker.step({"w": gradient})
            times.append(time.perf_counter() - began)
        say(median_s=statistics.median(times))
        sys.stdin.readline()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
