"""Clipping by norm: from the shards' sums of squares to one factor per tensor. Sums are added in
grid order, whoever adds them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from distnadam.config import NadamConfig
from distnadam.tensors.arrays import Array


def tensor_square_sums(
    num_tensors: int, sums_by_shard: Iterable[Sequence[tuple[int, Array]]]
) -> Array:
    """Return each tensor's sum of squares, float64 of shape (num_tensors,), from the chunks' sums
    of the shards in order.

    A running sum, not NumPy's pairwise one, so that how many shards hold a tensor cannot matter.
    """
    chunks: dict[int, list[Array]] = {}
    for shard in sums_by_shard:
        for tensor, sums in shard:
            chunks.setdefault(tensor, []).append(sums)
    totals = np.zeros(num_tensors, np.float64)
    for tensor, pieces in chunks.items():
        totals[tensor] = running_sum(np.concatenate(pieces))
    return totals


def running_sum(values: Array) -> float:
    """Return the sum of float64 values added one after another, in their order."""
    return float(np.cumsum(values)[-1]) if values.size else 0.0


def clip_scales(config: NadamConfig, square_sums: Array) -> list[float | None]:
    """Return for each tensor the factor its mean gradient is multiplied by; None where it is within
    the norm.
    """
    norms = [float(x) for x in np.sqrt(square_sums)]
    if config.clipnorm is not None:
        return [_factor(config.clipnorm, norm) for norm in norms]
    if config.global_clipnorm is not None:
        return [_factor(config.global_clipnorm, float(np.sqrt(running_sum(square_sums))))] * len(
            norms
        )
    return [None] * len(norms)


def _factor(limit: float, norm: float) -> float | None:
    return limit / norm if norm > limit else None
