"""How many of the package's functions one step passes, and in how many files.

    python -m tests.count_functions

counts the calling and the called side of one step of one worker in local mode, with a real trace.
"""

import sys
import threading
from types import FrameType
from typing import Self

import numpy as np

from distnadam import DistNadam

PACKAGE = "/distnadam/"


class Trace:
    """The functions of the package that are entered while it is on, in any thread."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.calls = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        _, inside, path = code.co_filename.rpartition(PACKAGE)
        if event == "call" and inside and not code.co_name.startswith("<"):
            self.functions.add((path, code.co_qualname))
            self.calls += 1

    def __enter__(self) -> Self:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def trace_step(num_shards: int = 1) -> Trace:
    """Return the trace of a step after others, when everything is set up."""
    ones = {"w": np.ones(100, np.float32)}
    with DistNadam(num_shards=num_shards, backend="local").build(ones) as optimizer:
        worker = optimizer.worker(0)
        for _ in range(80):  # a step's powers share factors with those before
            worker.step(ones)
        with Trace() as trace:
            worker.step(ones)
        return trace


def main() -> None:
    trace = trace_step()
    files = {path for path, _ in trace.functions}
    for path in sorted(files):
        print(f"{path}: {', '.join(sorted(name for p, name in trace.functions if p == path))}")
    print(f"{len(trace.functions)} functions in {len(files)} files, {trace.calls} calls")


if __name__ == "__main__":
    main()
