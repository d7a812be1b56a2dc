"""Clipping by norm: from a shard's mean gradient to sums of squares, and from all shards' sums to
one factor per tensor. Sums are added in the grid's order, whichever shard has them.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.mean import Grouping, Scratch, clipped_mean
from distnadam.nadam.step_scalars import NONE
from distnadam.tensors.arrays import Array, own_errors
from distnadam.tensors.layout import CHUNK, Range


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
        totals[tensor] = running_sum(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
    return totals


@own_errors()
def running_sum(values: Array) -> float:
    """Return the sum of float64 values added one after another, in their order."""
    if values.size < 2:
        return float(values[0]) if values.size else 0.0
    return float(np.cumsum(values)[-1])


@own_errors()
def square_sums(
    gradients: Sequence[Array], grouping: Grouping, stretches: Sequence[Range], scratch: Scratch
) -> list[Array]:
    """Return for each stretch [begin, end) of elements the sums of squares of the mean gradient,
    one for each `CHUNK` of its elements, float64.

    Inside a chunk the upper half is added onto the lower until one value is left, a short chunk
    being filled with zeros: one written order, whatever the machine. A stretch must begin on its
    tensor's chunk grid. Chunks are summed together, for many stretches are short.
    """
    bounds = [0, *accumulate(-(-(end - begin) // CHUNK) for begin, end in stretches)]
    sums = np.empty(bounds[-1], np.float64)
    rows = min(scratch.block // CHUNK, len(sums))
    values = np.empty((rows, CHUNK), np.float64)
    flat = values.reshape(-1)
    done = used = 0
    for begin, end in stretches:
        low = begin
        while low < end:
            high = min(low + (rows - used) * CHUNK, end)
            first, used = used * CHUNK, used - (low - high) // CHUNK
            between = first + high - low
            flat[first:between] = clipped_mean(
                [x[low:high] for x in gradients], grouping, None, None, scratch.blocks(high - low)
            )
            flat[between : used * CHUNK] = 0.0
            low = high
            if used == rows or done + used == len(sums):
                sums[done : done + used] = _sums_of_squares(values[:used])
                done, used = done + used, 0
    return [sums[begin:end] for begin, end in pairwise(bounds)]


def _sums_of_squares(values: Array) -> Array:
    """Return each row's sum of squares, which overwrite the values."""
    np.multiply(values, values, out=values)
    width = CHUNK
    while width > 1:
        width //= 2
        np.add(values[:, :width], values[:, width : 2 * width], out=values[:, :width])
    return values[:, 0]


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
