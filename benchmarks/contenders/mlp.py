"""A torch MLP whose backward pass takes as long as asked: says the batch for it, given seconds.

python -m benchmarks.contenders.mlp ELEMENTS SECONDS
"""

import statistics
import sys
import time

import torch

from tests.hosts.program import say

WIDTH = 1024
_PROBE = 64
_TRIES = 5


def make(elements: int) -> torch.nn.Sequential:
    """Return about so many parameters, in square layers without biases."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(elements // WIDTH**2)]
    return torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.ReLU())))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return a loss whose gradients are not zero."""
    return model(batch).square().mean()


def main(elements: int, seconds: float) -> None:
    torch.set_num_threads(1)
    model, batch = make(elements), torch.randn(_PROBE, WIDTH)
    times = []
    for _ in range(_TRIES):
        loss = loss_of(model, batch)
        began = time.perf_counter()
        loss.backward()
        times.append(time.perf_counter() - began)
    say(batch=max(1, round(_PROBE * seconds / statistics.median(times))))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
