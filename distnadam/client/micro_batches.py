"""Sums and means of micro-batches' gradients in flat memory, in the memory's own dtypes."""

from collections.abc import Mapping, Sequence

import numpy as np

from distnadam.tensors.arrays import Array, Flat, own_errors
from distnadam.tensors.layout import Layout

_BLOCK = 65536
"""Elements at a time, so that what is converted stays in the cache."""


@own_errors()
def add_micro_batch(layout: Layout, flat: Flat, leaves: Sequence[Array], *, is_first: bool) -> None:
    """Add gradients to those in `flat`, or copy the first there; frozen tensors have none.

    What comes in another dtype is converted first, so that the sum is one of the memory's dtype.
    """
    for index, (tensor, leaf) in enumerate(zip(layout.tensors, leaves, strict=True)):
        if index in layout.frozen:
            continue
        source, target = leaf.reshape(-1), flat[tensor.space][tensor.begin : tensor.end]
        for begin in range(0, source.size, _BLOCK):
            given, block = source[begin : begin + _BLOCK], target[begin : begin + _BLOCK]
            if is_first:
                np.copyto(block, given, casting="same_kind")
            else:
                np.add(block, given.astype(block.dtype, copy=False), out=block)


@own_errors()
def divide(flat: Flat, stretches: Mapping[str, Sequence[tuple[int, int]]], count: int) -> None:
    """Divide stretches of the memory by a count of micro-batches, once."""
    if count > 1:
        for space, values in flat.items():
            for first, last in stretches[space]:
                part = values[first:last]
                np.divide(part, values.dtype.type(count), out=part)


def unscale(values: Array, loss_scale: float) -> None:
    """Multiply gradients by the reciprocal of a loss scale, rounded to their dtype, as torch's
    GradScaler does; the caller has overflows and NaN ignored.
    """
    np.multiply(values, values.dtype.type(1.0 / loss_scale), out=values)
