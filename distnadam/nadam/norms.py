"""Clipping by norm: from a shard's mean gradient to sums of squares, and from all shards' sums to
one factor per tensor. Sums are added in the grid's order, whichever shard has them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.mean import Grouping, Scratch, clipped_mean
from distnadam.nadam.step_scalars import NONE
from distnadam.tensors.arrays import Array, own_errors
from distnadam.tensors.layout import CHUNK


@own_errors()
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


@own_errors()
def running_sum(values: Array) -> float:
    """Return the sum of float64 values added one after another, in their order."""
    return float(np.cumsum(values)[-1]) if values.size else 0.0


@own_errors()
def square_sums(
    gradients: Sequence[Array], grouping: Grouping, begin: int, end: int, scratch: Scratch
) -> Array:
    """Return the sum of squares of the mean gradient for each `CHUNK` of elements [begin, end),
    float64.

    Inside a chunk the upper half is added onto the lower until one value is left, a short chunk
    being filled with zeros: one written order, whatever the machine. `begin` must lie on its
    tensor's chunk grid.
    """
    sums = np.empty(-(-(end - begin) // CHUNK), np.float64)
    rows = scratch.block // CHUNK
    squares = np.empty((rows, CHUNK), np.float64)
    for row in range(0, len(sums), rows):
        low = begin + row * CHUNK
        high = min(low + rows * CHUNK, end)
        used = squares[: -(-(high - low) // CHUNK)]
        flat = used.reshape(-1)
        flat[: high - low] = clipped_mean(
            [x[low:high] for x in gradients], grouping, None, None, scratch.blocks(high - low)
        )
        flat[high - low :] = 0.0
        np.multiply(used, used, out=used)
        width = CHUNK
        while width > 1:
            width //= 2
            np.add(used[:, :width], used[:, width : 2 * width], out=used[:, :width])
        sums[row : row + len(used)] = used[:, 0]
    return sums


@own_errors()
def clip_scales(
    config: NadamConfig, square_sums: Array, groups: Sequence[int] | None
) -> list[float]:
    """Return for each tensor the factor its mean gradient is multiplied by, or only one that is
    that of all; `NONE` where it is within the norm.

    Args:
        config: the hyper-parameters.
        square_sums: each tensor's sum of squares.
        groups: the index of each tensor's group, or -1; None if no tensor is in one.
    """
    if config.global_clipnorm is not None:
        return [_factor(config.global_clipnorm, float(np.sqrt(running_sum(square_sums))))]
    norms = map(float, np.sqrt(square_sums))
    if groups is None:
        return [_factor(config.clipnorm, norm) for norm in norms]
    limits = [settings.clipnorm for settings in config.group_settings]
    limits.append(config.clipnorm)  # the last, at -1
    return [_factor(limits[group], norm) for group, norm in zip(groups, norms, strict=True)]


def _factor(limit: float | None, norm: float) -> float:
    return NONE if limit is None or norm <= limit else limit / norm
