"""State as users give and get it, to and from clocks and flat arrays. Pure.

Parameters are trees; Keras's list of weights is ``[iterations, m_schedule, *ms, *vs]``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distnadam.errors import StructureError
from distnadam.nadam.step_scalars import Clock
from distnadam.tensors.arrays import Array, Flat, as_numpy, empty_flat, is_float
from distnadam.tensors.layout import Layout


def to_weights(layout: Layout, clock: Clock, m: Flat, v: Flat) -> list[Array]:
    """Return the list: 0-d int64, 0-d float64, then views of the moments in the tensors' shapes."""
    return [
        np.array(clock.iterations, np.int64),
        np.array(clock.m_schedule, np.float64),
        *layout.views(m),
        *layout.views(v),
    ]


def from_weights(layout: Layout, weights: Sequence[Any]) -> tuple[Clock, Flat, Flat]:
    """Return the clock and the moments of a list as `to_weights` or Keras made it.

    Raises:
        StructureError: naming the expected and given length, or the index, the expected and the
            given.
    """
    tensors = layout.tensors
    expected = 2 + 2 * len(tensors)
    if not isinstance(weights, Sequence) or len(weights) != expected:
        got = len(weights) if isinstance(weights, Sequence) else repr(weights)
        raise StructureError(
            f"set_weights: expected {expected} arrays (iterations, m_schedule, ms, vs), got {got}"
        )
    arrays = [as_numpy(weight) for weight in weights]
    specs = [((), "float64")] * 2 + [(t.shape, t.space) for t in tensors] * 2
    for index, (array, (shape, space)) in enumerate(zip(arrays, specs, strict=True)):
        if array.shape != shape:
            raise StructureError(
                f"set_weights: index {index}: expected shape {shape}, got shape {array.shape}"
            )
        if not _fits(array, space):
            raise StructureError(
                f"set_weights: index {index}: expected finite {space} numbers, got {array.dtype} "
                f"{array.reshape(-1)[:1]!r}"
            )
    iterations, m_schedule = float(arrays[0]), float(arrays[1])
    if not 0 <= iterations < 2**53 or iterations != int(iterations):
        raise StructureError(
            "set_weights: index 0: expected a whole number of steps of at least 0, got "
            f"{iterations!r}"
        )
    if not 0.0 <= m_schedule <= 1.0:
        raise StructureError(
            "set_weights: index 1: expected a product of momentum coefficients, in [0, 1], got "
            f"{m_schedule!r}"
        )
    if any((array < 0).any() for array in arrays[2 + len(tensors) :]):
        raise StructureError(
            "set_weights: the second moments (the last arrays) must be at least 0, got a negative "
            "value"
        )
    moments: list[Flat] = []
    for first in (2, 2 + len(tensors)):
        flat = empty_flat(layout.sizes)
        for view, array in zip(
            layout.views(flat), arrays[first : first + len(tensors)], strict=True
        ):
            np.copyto(view, array, casting="unsafe")
        moments.append(flat)
    return Clock(int(iterations), m_schedule), moments[0], moments[1]


def finite_params(layout: Layout, params: Any) -> Flat:
    """Return a tree of parameters as flat arrays.

    Raises:
        StructureError: naming the tensor that does not fit the layout, or is not finite.
    """
    flat = layout.flat(params, what="params")
    for tensor, view in zip(layout.tensors, layout.views(flat), strict=True):
        if not np.isfinite(view).all():
            raise StructureError(
                f"params: {tensor.path!r}: expected finite values, got NaN or infinity"
            )
    return flat


def _fits(array: Array, space: str) -> bool:
    if not is_float(array.dtype) and array.dtype.kind not in "iu":
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(space)).all())
