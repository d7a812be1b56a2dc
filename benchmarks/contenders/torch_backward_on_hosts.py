"""A rank of torch over hosts: DDP over gloo, whose buckets leave during the backward pass, and
NAdam foreach. Says what `ours_on_hosts` does.
"""

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders.mlp import WIDTH, loss_of, make
from benchmarks.contenders.rounds import report


def main(about: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=about["rank"], world_size=about["world_size"])
    model = DistributedDataParallel(make(about["elements"]), gradient_as_bucket_view=True)
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.002, foreach=True)
    batch = torch.randn(about["batch"], WIDTH)

    def run(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
        return times

    report(run, about)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
