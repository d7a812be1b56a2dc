"""A step of the torch optimizer beside a local worker's own step with views and torch's NAdam; a
turn of an ordinary loop of one process, and of two ranks on one host, beside
DistributedDataParallel.

torch has no fused NAdam; its fused Adam is another formula, of fewer operations.

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
    """Seconds of a local step by gradients that lie where the step wants them."""
    plain = distnadam.DistNadam(backend="local").build(
        {name: tensor.detach() for name, tensor in model_of(elements).items()}
    )
    worker = plain.worker(0)
    for view in worker.gradients().values():
        view[...] = 0.1
    tensors = [tensor.detach() for tensor in model_of(elements).values()]

    def copied() -> None:
        tree = worker.step()
        torch._foreach_copy_(tensors, [torch.tensor(tree[name]) for name in NAMES])

    alone, seen = Summed(elements), Summed(elements)
    views = [tensor.detach() for tensor in seen.parameters()]  # so that its memory stays its own
    optimizers = [trained(model) for model in (alone, seen)]
    steps: dict[str, Callable[[], object]] = {
        "worker.step, views": worker.step,
        "torch optimizer": optimizers[0].step,
        "torch optimizer, tensors that others see": optimizers[1].step,
        "worker.step, copied into torch": copied,
        "torch NAdam, foreach": peer(torch.optim.NAdam, elements, foreach=True),
        "torch NAdam, a loop": peer(torch.optim.NAdam, elements, foreach=False),
        "torch Adam, fused": peer(torch.optim.Adam, elements, fused=True),
    }
    found = timed(steps, count)
    worker.close(), plain.close(), views.clear()
    for optimizer in optimizers:
        optimizer.close()
    return found


def trained(model: Summed) -> Any:
    """An optimizer whose gradients lie in the worker's memory: from the second step on, hooks move
    them there.
    """
    optimizer = distnadam.torch.DistNadam(model.named_parameters(), backend="local")
    for _ in range(2):
        optimizer.zero_grad()
        model(0.1).backward()
        optimizer.step()
    return optimizer


def peer(cls: Any, elements: int, **settings: bool) -> Callable[[], object]:
    tensors = list(model_of(elements).values())
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, 0.1)
    step: Callable[[], object] = cls(tensors, **settings).step
    return step


def turn_of(model: Any, optimizer: Any) -> Callable[[], object]:
    """A turn of an ordinary loop."""

    def turn() -> None:
        optimizer.zero_grad()
        model(0.1).backward()
        optimizer.step()

    return turn


def turns_of_one(elements: int, count: int) -> dict[str, float]:
    """Seconds of a turn of the loop of one process."""
    ours, theirs = Summed(elements), Summed(elements)
    optimizer = distnadam.torch.DistNadam(ours.named_parameters(), backend="local")
    turns = {
        "one process: torch optimizer": turn_of(ours, optimizer),
        "one process: torch NAdam, foreach": turn_of(
            theirs, torch.optim.NAdam(theirs.parameters(), foreach=True)
        ),
    }
    found = timed(turns, count)
    optimizer.close()
    return found


def as_rank(elements: int, count: int, file: str) -> None:
    """Time a turn of the loop, of ours and of DDP in turn; rank 0 writes the seconds."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    models = {name: Summed(elements) for name in ("ours", "overlap", "nadam", "adam")}
    nadam, adam = (
        torch.nn.parallel.DistributedDataParallel(models[name]) for name in ("nadam", "adam")
    )
    ours = {
        name: distnadam.torch.DistNadam(models[name].named_parameters(), overlap=name == "overlap")
        for name in ("ours", "overlap")
    }
    turns = {
        f"{RANKS} ranks: torch optimizer": turn_of(models["ours"], ours["ours"]),
        f"{RANKS} ranks: torch optimizer, overlap": turn_of(models["overlap"], ours["overlap"]),
        f"{RANKS} ranks: DDP + NAdam, foreach": turn_of(
            nadam, torch.optim.NAdam(nadam.parameters(), foreach=True)
        ),
        f"{RANKS} ranks: DDP + Adam, fused": turn_of(
            adam, torch.optim.Adam(adam.parameters(), fused=True)
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(count + 3):
        for name, turn in turns.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            turn()
            if number >= 3:
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
        for measure in (beside_a_worker, turns_of_one, beside_ddp):
            found = measure(elements, count)
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
