"""Keras's list of optimizer weights, ``[iterations, m_schedule, *ms, *vs]``, to and from the shards' clock and flat moments. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distnadam.arrays import Array, Flat, as_numpy, empty_flat
from distnadam.errors import StructureError
from distnadam.layout import Layout
from distnadam.nadam.schedule import Clock


def to_weights(layout: Layout, clock: Clock, m: Flat, v: Flat) -> list[Array]:
    """Return the list: 0-d int64, 0-d float64, then views of the moments in the tensors' shapes."""
    return [np.array(clock.iterations, np.int64), np.array(clock.m_schedule, np.float64), *layout.views(m), *layout.views(v)]


def from_weights(layout: Layout, weights: Sequence[Any]) -> tuple[Clock, Flat, Flat]:
    """Return the clock and the moments of a list as `to_weights` or Keras made it.

    Raises:
        StructureError: naming the expected and given length, or the index, the expected and the given.
    """
    tensors = layout.tensors
    expected = 2 + 2 * len(tensors)
    if len(weights) != expected:
        raise StructureError(f"set_weights: expected {expected} arrays (iterations, m_schedule, ms, vs), got {len(weights)}")
    arrays = [as_numpy(weight) for weight in weights]
    shapes = [(), (), *(t.shape for t in tensors), *(t.shape for t in tensors)]
    for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if array.shape != shape:
            raise StructureError(f"set_weights: index {index}: expected shape {shape}, got shape {array.shape}")
        if array.dtype.kind not in "iufV" or not np.isfinite(array.astype(np.float64)).all():
            raise StructureError(f"set_weights: index {index}: expected finite numbers, got {array.dtype} with {array.reshape(-1)[:1]!r}")
    iterations, m_schedule = float(arrays[0]), float(arrays[1])
    if iterations < 0 or iterations != int(iterations):
        raise StructureError(f"set_weights: index 0: expected a whole number of steps of at least 0, got {iterations!r}")
    if any((array < 0).any() for array in arrays[2 + len(tensors) :]):
        raise StructureError("set_weights: the second moments (the last arrays) must be at least 0, got a negative value")
    moments: list[Flat] = []
    for first in (2, 2 + len(tensors)):
        flat = empty_flat(layout.sizes)
        for view, array in zip(layout.views(flat), arrays[first : first + len(tensors)], strict=True):
            np.copyto(view, array, casting="unsafe")
        moments.append(flat)
    return Clock(int(iterations), m_schedule), moments[0], moments[1]
