"""A rank of torch over hosts: gloo's all-reduce, NAdam foreach; says what `ours_on_hosts` does.

In half precision gradients are narrowed, reduced and widened, as DDP's compression hook does.
"""

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders.rounds import report


def main(about: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=about["rank"], world_size=about["world_size"])
    parameter = torch.nn.Parameter(torch.zeros(about["elements"]))
    parameter.grad = torch.randn(about["elements"])
    optimizer = torch.optim.NAdam([parameter], lr=0.002, foreach=True)

    def reduce(gradient: torch.Tensor) -> None:
        if about["dtype"] is None:
            dist.all_reduce(gradient)
            gradient.div_(about["world_size"])
            return
        narrow = gradient.to(getattr(torch, about["dtype"])).div_(about["world_size"])
        dist.all_reduce(narrow)
        gradient.copy_(narrow)

    def run(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            assert parameter.grad is not None
            reduce(parameter.grad)
            optimizer.step()
            times.append(time.perf_counter() - began)
        return times

    report(run, about)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
