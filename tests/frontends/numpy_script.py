"""A rank of a script without a framework: it makes three steps, says its optimizer's name, steps on
when it is told to, and says how that ended.
"""

import os
import sys

import numpy as np

from distnadam import Options
from distnadam.errors import DistNadamError
from distnadam.frontends.replica import Replica


def main() -> None:
    options = Options(rejoin_timeout_s=0.5, step_timeout_s=60.0)
    replica = Replica({"num_shards": 2, "replicas": 1, "backend": "ray", "options": options})
    params = {"w": np.ones(100, np.float32)}
    replica.start(params)
    for _ in range(3):
        replica.step(params, params, params.update)
    print(replica.optimizer.get_config()["name"], flush=True)
    sys.stdin.readline()
    try:
        while True:
            replica.step(params, params, params.update)
    except DistNadamError as error:
        print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    assert "WORLD_SIZE" in os.environ
    main()
