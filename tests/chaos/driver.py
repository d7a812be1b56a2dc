"""A driver of its own: `python -m tests.chaos.driver ADDRESS NAME DIRECTORY CASE` builds a named
optimizer and waits to be killed.

Without DIRECTORY and CASE it connects to the optimizer of that name and says which round it is at.
"""

import json
import signal
import sys
from pathlib import Path

import ray

from distnadam import DistNadam
from tests.chaos.scene import Case
from tests.models import params


def main(address: str, name: str, directory: str | None = None, case: str | None = None) -> None:
    ray.init(address=address, log_to_driver=False)
    if directory is None or case is None:
        print("round", DistNadam.connect(name).round, flush=True)
        return
    optimizer = Case(**json.loads(case)).optimizer(Path(directory), name).build(params())
    print("built", optimizer.round, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
