"""A rank of torch over hosts: gloo's all-reduce, NAdam foreach; says what `ours_on_hosts` does.

In half precision gradients are narrowed, reduced and widened, as DDP's compression hook does. With
`zero` each rank steps a part of the parameters, and sends them to the others.
"""

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.contenders.rounds import report


def main(about: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=about["rank"], world_size=about["world_size"])
    whole = torch.randn(about["elements"])
    # ZeRO gives whole tensors to ranks
    num_tensors = 4 * about["world_size"] if about["zero"] else 1
    parameters = [
        torch.nn.Parameter(part) for part in torch.zeros(about["elements"]).chunk(num_tensors)
    ]
    for parameter, part in zip(parameters, whole.chunk(num_tensors), strict=True):
        parameter.grad = part
    settings: dict[str, Any] = {"lr": 0.002, "foreach": True}
    optimizer: torch.optim.Optimizer
    if about["zero"]:
        optimizer = ZeroRedundancyOptimizer(
            parameters, torch.optim.NAdam, parameters_as_bucket_view=True, **settings
        )
    else:
        optimizer = torch.optim.NAdam(parameters, **settings)

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
            reduce(whole)
            optimizer.step()
            times.append(time.perf_counter() - began)
        return times

    report(run, about)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
