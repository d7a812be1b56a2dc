"""One training of a built-in torch task by one contender: prints its losses, times and metrics.

All take the same batches, of as many ranks, and begin with the same parameters. On several hosts a
rank and a shard are on each: `distnadam` runs on the head of a Ray, and `ddp` on every host, each
with its RANK, and with MASTER_ADDR and MASTER_PORT.
"""

import argparse
import itertools
import json
import os
import queue
import socket
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distnadam import DistNadam, Options, fit
from distnadam.training.callbacks import Callback
from distnadam.training.steps import StepRecord
from distnadam.training.tasks import built_in

LR, ADAMW_LR = 0.002, 0.001
Result = dict[str, Any]


class Clock(Callback):
    """Knows when each step was recorded, from the begin of the first: `fit` has begun to start
    workers before.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_record(self, record: StepRecord) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        usual = statistics.median(b - a for a, b in itertools.pairwise(self.times))
        return [usual + at - self.times[0] for at in self.times]


def distnadam(args: argparse.Namespace) -> Result:
    clock = Clock()
    each = Options(shard_resources={"shard": 1}, worker_cpus=1) if args.on_hosts else Options()
    with tempfile.TemporaryDirectory() as directory:
        history = fit(
            built_in(args.task),
            steps=args.steps,
            num_workers=args.workers,
            num_shards=args.workers if args.on_hosts else 2,
            optimizer=DistNadam(lr=LR, epsilon=1e-8, options=each),
            backend=args.backend,
            seed=args.seed,
            checkpoint_dir=directory,
            callbacks=[clock],
            verbose=False,
        )
    return {"losses": history.losses, "seconds": clock.seconds(), "metrics": history.metrics}


class Loop:
    """A task trained by an optimizer of torch."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.args, self.task = args, built_in(args.task)
        self.params = self.task.init(args.seed)
        self.module = self.task.module  # type: ignore[attr-defined]  # both tasks have one
        self.losses: list[float] = []
        self.times: list[float] = []

    def loss(self, rank: int, step: int) -> float:
        """Add a rank's gradients to the module's, and return its loss."""
        given = dict(self.module.named_parameters())
        arrays = {name: p.detach().numpy() for name, p in given.items()}
        kept = {name: p.grad for name, p in given.items()}
        batch = self.task.batch(step, rank, self.args.workers)
        loss, _ = self.task.loss_and_gradients(arrays, batch)
        for name, p in given.items():
            if (before := kept[name]) is not None:
                p.grad += before
        return loss

    def result(self) -> Result:
        params = {name: p.detach().numpy() for name, p in self.module.named_parameters()}
        metrics = dict(self.task.evaluate(params))
        return {"losses": self.losses, "seconds": self.times, "metrics": metrics}


def optimizer_of(name: str, module: Any) -> Any:
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=ADAMW_LR)
    return torch.optim.NAdam(module.parameters(), lr=LR)


def one_process(args: argparse.Namespace) -> Result:
    loop = Loop(args)
    optimizer = optimizer_of(args.contender, loop.module)
    began = time.perf_counter()
    for step in range(args.steps):
        optimizer.zero_grad()
        losses = [loop.loss(rank, step) for rank in range(args.workers)]
        for parameter in loop.module.parameters():
            parameter.grad /= args.workers
        optimizer.step()
        loop.losses.append(sum(losses) / len(losses))
        loop.times.append(time.perf_counter() - began)
    return loop.result()


def ddp_rank(rank: int, args: argparse.Namespace, results: Any) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    loop = Loop(args)
    wrapped = torch.nn.parallel.DistributedDataParallel(Whole(loop))
    optimizer = optimizer_of("nadam", wrapped)
    total = torch.zeros(1)
    dist.barrier()
    began = time.perf_counter()
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = wrapped(step)
        loss.backward()
        optimizer.step()
        total[0] = loss.item()
        dist.all_reduce(total)  # as fit reports the mean loss of its ranks
        loop.losses.append(total.item() / args.workers)
        loop.times.append(time.perf_counter() - began)
    if rank == 0:
        results.put(loop.result())
    dist.barrier()
    dist.destroy_process_group()


class Whole(torch.nn.Module):
    """The loss of one step, as the forward pass of a module that DDP can wrap."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.module, self.loop = loop.module, loop

    def forward(self, step: int) -> Any:
        rank = dist.get_rank()
        batch = self.loop.task.batch(step, rank, self.loop.args.workers)
        return self.loop.task.loss_of(self.module, batch)  # type: ignore[attr-defined]


def ddp(args: argparse.Namespace) -> Result:
    if args.on_hosts:
        mine: queue.SimpleQueue[Result] = queue.SimpleQueue()
        rank = int(os.environ["RANK"])
        ddp_rank(rank, args, mine)
        return {} if rank else mine.get()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(ddp_rank, args=(args, results), nprocs=args.workers)
    found: Result = results.get()
    return found


CONTENDERS = {"distnadam": distnadam, "nadam": one_process, "adamw": one_process, "ddp": ddp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("task", choices=["digits-torch", "charlm"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-hosts", action="store_true")
    parser.add_argument("--backend", default="ray", choices=["ray", "local"])
    args = parser.parse_args()
    print(json.dumps(CONTENDERS[args.contender](args)))


if __name__ == "__main__":
    main()
