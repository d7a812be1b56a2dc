"""Small models in torch, and loops that train them as a user's script does."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

PEERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "DistNadam": (torch.optim.NAdam, {}),
    "DistNadamW": (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "DistAdam": (torch.optim.Adam, {}),
    "DistAdamW": (torch.optim.AdamW, {}),
}
"""Each class of ours, and what torch has of the same formula."""


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """A model of two layers, the same for the same seed."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    return torch.nn.Sequential(*layers).to(dtype)


def batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)
    ]


def loss_of(model: Callable[..., Any], batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(batch)
    return (found - batch[:, : found.shape[1]].sin()).square().mean()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[torch.Tensor],
    scheduler: Any = None,
) -> list[float]:
    """Train as an ordinary loop does; return the losses."""
    losses = []
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def bits(model: torch.nn.Module) -> list[bytes]:
    return [p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()]


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)
