"""The mean gradient of a block, scaled and clipped, in working memory of one thread. NumPy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distnadam.tensors.arrays import Array

BLOCK_BYTES = 768 * 1024
"""Bytes of one block of one array: smaller ones lose to the cost of a ufunc's call and to threads'
turns, larger ones leave the cache.
"""


class Scratch:
    """Blocks of working memory for one thread and one dtype."""

    def __init__(self, dtype: Any) -> None:
        self.block = BLOCK_BYTES // np.dtype(dtype).itemsize
        self.mean = np.empty(self.block, dtype)
        self.a = np.empty(self.block, dtype)
        self.b = np.empty(self.block, dtype)


def clipped_mean(
    gradients: Sequence[Array],
    scale: float | None,
    clipvalue: float | None,
    out: Array,
    spare: Array,
) -> Array:
    """Return the mean in the given order, scaled and clipped; the gradient itself, untouched, where
    there is nothing to do.
    """
    g = _widened(gradients[0], out)
    if len(gradients) > 1:
        np.add(g, _widened(gradients[1], spare), out=out)
        for other in gradients[2:]:
            np.add(out, _widened(other, spare), out=out)
        g = np.divide(out, out.dtype.type(len(gradients)), out=out)
    if scale is not None:
        g = np.multiply(g, out.dtype.type(scale), out=out)
    if clipvalue is not None:
        limit = out.dtype.type(clipvalue)
        g = np.clip(g, -limit, limit, out=out)
        if limit == 0:
            out.fill(0)  # of either sign otherwise, as the machine likes
    return g


def _widened(values: Array, buffer: Array) -> Array:
    if values.dtype == buffer.dtype:
        return values
    np.copyto(buffer, values)
    return buffer
