"""A step of the torch optimizer: beside a local worker's own step with views, and, of two ranks on
one host, beside torch's NAdam in DistributedDataParallel.

    .venv-bench/bin/python -m benchmarks.torch_step
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import distnadam
from benchmarks.local import timed

SIZES = {10**6: 150, 10**7: 20}
"""Steps of each contender, by number of elements."""
TENSORS = 50
RANKS = 2
NAMES = [f"t{index:02}" for index in range(TENSORS)]


def model_of(elements: int) -> torch.nn.ParameterDict:
    torch.manual_seed(0)
    each = elements // TENSORS
    return torch.nn.ParameterDict({name: torch.randn(each) * 0.1 for name in NAMES})


class Summed(torch.nn.Module):
    """A model whose backward pass is one multiplication for each element."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.tensors = model_of(elements)

    def forward(self, factor: float) -> Any:
        return sum((tensor * factor).sum() for tensor in self.tensors.values())


def beside_a_worker(elements: int, count: int) -> dict[str, float]:
    """Seconds of a local step by gradients that lie in the worker's memory, of both."""
    model, other = Summed(elements), model_of(elements)
    optimizer = distnadam.torch.DistNadam(model.named_parameters(), backend="local")
    for _ in range(2):  # from the second on the hooks move gradients
        optimizer.zero_grad()
        model(0.1).backward()
        optimizer.step()
    plain = distnadam.DistNadam(backend="local").build(
        {name: tensor.detach() for name, tensor in other.items()}
    )
    worker = plain.worker(0)
    for view in worker.gradients().values():
        view[...] = 0.1
    tensors = [tensor.detach() for tensor in other.values()]

    def copied() -> None:
        tree = worker.step()
        torch._foreach_copy_(tensors, [torch.tensor(tree[name]) for name in NAMES])

    steps: dict[str, Callable[[], object]] = {
        "torch optimizer": optimizer.step,
        "worker.step, views": worker.step,
        "worker.step, copied into torch": copied,
        "torch NAdam": nadam_of(elements),
    }
    found = timed(steps, count)
    worker.close(), plain.close(), optimizer.close()
    return found


def nadam_of(elements: int) -> Callable[[], object]:
    tensors = list(model_of(elements).values())
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, 0.1)
    return torch.optim.NAdam(tensors, foreach=True).step


def as_rank(elements: int, count: int, file: str) -> None:
    """Time a backward pass and a step, of ours and of DDP in turn; rank 0 writes the seconds."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    ours, theirs = Summed(elements), Summed(elements)
    wrapped = torch.nn.parallel.DistributedDataParallel(theirs)
    optimizers = {
        "distnadam.torch": (ours, distnadam.torch.DistNadam(ours.named_parameters())),
        "DDP + NAdam": (wrapped, torch.optim.NAdam(wrapped.parameters(), foreach=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(count + 3):
        for name, (model, optimizer) in optimizers.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            optimizer.zero_grad()
            model(0.1).backward()
            optimizer.step()
            if turn >= 3:
                times[name].append(time.perf_counter() - began)
    if torch.distributed.get_rank() == 0:
        medians = {name: statistics.median(found) for name, found in times.items()}
        Path(file).write_text(json.dumps(medians))
    torch.distributed.destroy_process_group()


def beside_ddp(elements: int, count: int) -> dict[str, float]:
    file = Path(f"build/torch_step_{os.getpid()}.json").absolute()
    file.parent.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["-m", "benchmarks.torch_step", str(elements), str(count), str(file)]
    subprocess.run([*launcher, f"--nproc-per-node={RANKS}", *script], check=True)
    found: dict[str, float] = json.loads(file.read_text())
    file.unlink()
    return found


def main() -> None:
    table = Table("elements", "contender", "ms", "of the first")
    for elements, count in SIZES.items():
        for found in (beside_a_worker(elements, count), beside_ddp(elements, count)):
            first = next(iter(found.values()))
            for name, seconds in found.items():
                table.add_row(
                    f"{elements:,}", name, f"{1000 * seconds:.2f}", f"{seconds / first:.2f}"
                )
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        as_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main()
