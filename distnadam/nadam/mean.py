"""The mean gradient of a block, scaled and clipped, in working memory of one thread. NumPy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distnadam.tensors.arrays import Array

BLOCK_BYTES = 768 * 1024
"""Bytes of one block of one array: smaller ones lose to the cost of a ufunc's call and to threads'
turns, larger ones leave the cache.
"""


@dataclass(slots=True)  # not frozen, which costs a microsecond a step
class Grouping:
    """How the gradients that make up a mean are summed: group by group, then the groups' sums.

    Within a group, and of the groups' sums, one is added after the other.

    Attributes:
        sizes: how many of the gradients, in their order, belong to each group; none is empty.
        count: the ranks whose mean it is, by which the sum is divided. A gradient that is a sum
            already stands for several.
    """

    sizes: tuple[int, ...]
    count: int


def in_order(count: int) -> Grouping:
    """Return the grouping that adds the gradients of `count` ranks one after the other."""
    return Grouping((count,), count)


class Blocks(NamedTuple):
    """Three blocks of one length: for the mean, and two that are overwritten meanwhile."""

    mean: Array
    a: Array
    b: Array


class Scratch:
    """Blocks of working memory for one thread and one dtype."""

    def __init__(self, dtype: Any) -> None:
        self.block = BLOCK_BYTES // np.dtype(dtype).itemsize
        self._whole = Blocks(*(np.empty(self.block, dtype) for _ in range(3)))

    def blocks(self, length: int) -> Blocks:
        """Return the blocks' first `length` elements."""
        mean, a, b = self._whole
        return Blocks(mean[:length], a[:length], b[:length])


class Factor(NamedTuple):
    """What elements of a block are multiplied by, limited to, or the like.

    Attributes:
        value: one of all, in their dtype, or one of each.
        where: which elements have one; True for all.
    """

    value: Any
    where: Any = True

    def before(self, values: Array, out: Array) -> Array:
        """Return the values, such that a change of those that have a factor may go to `out`."""
        if self.where is not True and values is not out:
            np.copyto(out, values)
            return out
        return values


def clipped_mean(
    gradients: Sequence[Array],
    grouping: Grouping,
    scale: Factor | None,
    limit: Factor | None,
    blocks: Blocks,
) -> Array:
    """Return the mean, scaled and clipped; the gradient itself, untouched, where there is nothing
    to do.
    """
    out, a, b = blocks
    done = grouping.sizes[0]
    g = summed(gradients[:done], out, a)
    for size in grouping.sizes[1:]:
        g = np.add(g, summed(gradients[done : done + size], b, a), out=out)
        done += size
    if grouping.count > 1:
        g = np.divide(g, out.dtype.type(grouping.count), out=out)
    if scale is not None:
        g = np.multiply(scale.before(g, out), scale.value, out=out, where=scale.where)
    if limit is not None:
        most, where = limit
        g = np.clip(limit.before(g, out), -most, most, out=out, where=where)
        if np.any(none := most == 0):
            np.copyto(out, 0, where=none)  # of either sign otherwise, as the machine likes
    return g


def summed(gradients: Sequence[Array], out: Array, spare: Array) -> Array:
    """Return the sum in the given order, in the dtype of `out`; the gradient itself, untouched,
    where it is the only one and of that dtype.
    """
    total = _widened(gradients[0], out)
    for other in gradients[1:]:
        total = np.add(total, _widened(other, spare), out=out)
    return total


def _widened(values: Array, buffer: Array) -> Array:
    if values.dtype == buffer.dtype:
        return values
    np.copyto(buffer, values)
    return buffer
