"""torch.distributed over gloo: all-reduce and NAdam foreach on every rank, or ZeRO around it."""

import argparse
import json
import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.optim import ZeroRedundancyOptimizer


def run(rank: int, args: argparse.Namespace, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    flat = torch.zeros(args.elements)
    gradient = torch.randn(args.elements, generator=torch.Generator().manual_seed(rank))
    pieces = 8 if args.zero else 1  # ZeRO assigns whole tensors to ranks
    parameters = [torch.nn.Parameter(part) for part in flat.chunk(pieces)]
    for parameter, part in zip(parameters, gradient.chunk(pieces), strict=True):
        parameter.grad = part
    if args.zero:
        optimizer: Any = ZeroRedundancyOptimizer(
            parameters,
            optimizer_class=torch.optim.NAdam,
            parameters_as_bucket_view=True,
            lr=0.002,
            foreach=True,
        )
    else:
        optimizer = torch.optim.NAdam(parameters, lr=0.002, foreach=True)
    times = []
    for _ in range(args.steps):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradient)
        gradient.div_(args.workers)
        optimizer.step()
        times.append(time.perf_counter() - began)
    if rank == 0:
        results.put(times)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=10**6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--zero", action="store_true")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run, args=(args, port, results), nprocs=args.workers)
    print(json.dumps(results.get()))


if __name__ == "__main__":
    main()
