"""A step of the torch optimizer for a model on a GPU: beside the time that its bytes alone take to
the host and back, with memory that is pinned and that is not, and beside torch's own on the GPU.

    .venv-bench/bin/python -m benchmarks.cuda_copies
"""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import distnadam
from benchmarks.local import timed
from benchmarks.torch_step import Summed
from distnadam.torch import device_copies

SIZES = {10**6: 100, 10**7: 50, 10**8: 10}
"""Steps of each contender, by number of elements, which are in 50 tensors."""


def given(elements: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with gradients."""
    model = Summed(elements).to(device, dtype)
    for tensor in model.parameters():
        tensor.grad = torch.full_like(tensor, 0.1)
    return model


def ours(
    elements: int, device: str, dtype: torch.dtype = torch.float32, *, pinned: bool = True
) -> Callable[[], object]:
    least = device_copies.LEAST_PINNED
    device_copies.LEAST_PINNED = least if pinned else 1 << 60
    optimizer = distnadam.torch.DistNadam(given(elements, device, dtype).parameters())
    optimizer.step()
    device_copies.LEAST_PINNED = least
    return finished(optimizer.step)


def overlapping(elements: int, *, overlap: bool) -> Callable[[], object]:
    """A backward pass and a step."""
    model = Summed(elements).to("cuda")
    optimizer = distnadam.torch.DistNadam(model.parameters(), overlap=overlap)

    def step() -> None:
        optimizer.zero_grad()
        model(0.1).backward()
        optimizer.step()

    step()
    return finished(step)


def finished(step: Callable[[], object]) -> Callable[[], object]:
    """Wait for what a step has left to the GPU."""

    def timed_step() -> None:
        step()
        torch.cuda.synchronize()

    return timed_step


def bytes_alone(elements: int) -> Callable[[], object]:
    """As many bytes as a step moves, to pinned memory and back."""
    host = torch.empty(elements, pin_memory=True)
    device = torch.empty(elements, device="cuda")

    def both_ways() -> None:
        host.copy_(device, non_blocking=True)
        device.copy_(host, non_blocking=True)

    return finished(both_ways)


def contenders(elements: int) -> dict[str, Callable[[], object]]:
    parameters = given(elements, "cuda").parameters
    return {
        "the bytes alone, pinned": bytes_alone(elements),
        "distnadam.torch, pinned": ours(elements, "cuda"),
        "distnadam.torch, not pinned": ours(elements, "cuda", pinned=False),
        "distnadam.torch, bfloat16": ours(elements, "cuda", torch.bfloat16),
        "distnadam.torch, model on the CPU": ours(elements, "cpu"),
        "backward and step": overlapping(elements, overlap=False),
        "backward and step, overlap": overlapping(elements, overlap=True),
        "torch NAdam, foreach": finished(torch.optim.NAdam(parameters(), foreach=True).step),
        "torch Adam, fused": finished(torch.optim.Adam(parameters(), fused=True).step),
    }


def main() -> None:
    table = Table("elements", "contender", "ms", "of the bytes alone")
    for elements, count in SIZES.items():
        found = timed(contenders(elements), count)
        first = next(iter(found.values()))
        for name, seconds in found.items():
            ratio = f"{seconds / first:.2f}"
            table.add_row(f"{elements:,}", name, f"{1000 * seconds:.2f}", ratio)
        table.add_section()
    Console(width=120).print(torch.cuda.get_device_name(), table)


if __name__ == "__main__":
    main()
