"""A rank of MPI over hosts: Open MPI's all-reduce from torch's memory, NAdam foreach; the first
rank says what `ours_on_hosts` does.
"""

import json
import sys
import time
from typing import Any

import torch
from mpi4py import MPI

from benchmarks.contenders.rounds import report


def main(about: dict[str, Any]) -> None:
    world = MPI.COMM_WORLD
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(about["elements"]))
    parameter.grad = torch.randn(about["elements"])
    optimizer = torch.optim.NAdam([parameter], lr=0.002, foreach=True)
    gradient = parameter.grad.numpy()

    def run(steps: int) -> list[float]:
        world.bcast(steps)
        return turns(steps)

    def turns(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            world.Allreduce(MPI.IN_PLACE, gradient)
            parameter.grad.div_(world.size)
            optimizer.step()
            times.append(time.perf_counter() - began)
        return times

    if world.rank == 0:
        report(run, about)
        world.bcast(0)
        return
    while steps := world.bcast(None):
        turns(steps)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
