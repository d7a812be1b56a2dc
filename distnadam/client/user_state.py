"""State as users give and get it, to and from clocks and flat arrays. Pure.

Parameters are trees; Keras's list of weights is ``[iterations, m_schedule, *ms, *vs]``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distnadam.errors import ConfigError, StructureError
from distnadam.nadam.step_scalars import Clock, TensorClock
from distnadam.tensors.arrays import NAME_OF, Array, Flat, empty_flat, own_errors
from distnadam.tensors.layout import Layout
from distnadam.tensors.leaves import as_numpy, first_of, kind_of, not_finite, remedy_of


def to_weights(layout: Layout, clock: Clock, m: Flat, v: Flat) -> list[Array]:
    """Return the list: 0-d int64, 0-d float64, then views of the moments in the tensors' shapes.

    Raises:
        ConfigError: naming a tensor that has another clock than the optimizer's.
    """
    own = TensorClock(clock.iterations, clock.m_schedule)
    for index, tensor in enumerate(layout.tensors):
        if index not in layout.frozen and (found := clock.of_tensor(index)) != own:
            raise ConfigError(
                f"get_weights: {tensor.path!r} was stepped {found.steps} times, with a product of "
                f"momentum coefficients of {found.product:.6g}, and the optimizer {own.steps} "
                f"times, with {own.product:.6g}: Keras's list has one clock for all tensors; save "
                "a checkpoint"
            )
    return [
        np.array(clock.iterations, np.int64),
        np.array(clock.m_schedule, np.float64),
        *layout.views(m),
        *layout.views(v),
    ]


@own_errors()
def from_weights(layout: Layout, weights: Any, *, finite: bool = True) -> tuple[Clock, Flat, Flat]:
    """Return the clock and the moments of a list as `to_weights` or Keras made it.

    Args:
        layout: the model's.
        weights: any iterable of the arrays, such as the object array that `np.save` makes of them.
        finite: whether NaN and infinity are refused.

    Raises:
        StructureError: naming the expected and given length, or the index, the expected and the
            given.
    """
    tensors = layout.tensors
    arrays = _listed(weights, 2 + 2 * len(tensors))
    specs = [((), "float64")] * 2 + [(t.shape, t.space) for t in tensors] * 2
    names = ["iterations", "m_schedule"]
    names += [f"{slot} of {t.path!r}" for slot in "mv" for t in tensors]
    for index, (given, name, (shape, space)) in enumerate(zip(arrays, names, specs, strict=True)):
        try:
            arrays[index] = _weight(given, shape, space, finite=finite or index < 2)
        except StructureError as error:
            raise StructureError(
                f"set_weights: index {index}: {error}, for {name}"
            ) from error.__cause__
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
    for index in range(2 + len(tensors), len(arrays)):
        negative = arrays[index] < 0
        if negative.any():
            raise StructureError(
                f"set_weights: index {index}: the second moments (the last arrays) must be at "
                f"least 0, got {first_of(arrays[index], negative)}, for {names[index]}"
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


@own_errors()
def params_from(layout: Layout, params: Any, *, what: str = "params", finite: bool = True) -> Flat:
    """Return a tree of parameters as flat arrays.

    Args:
        layout: the model's.
        params: in the structure given to `build`.
        what: begins every message.
        finite: whether NaN and infinity are refused.

    Raises:
        StructureError: naming the tensor that does not fit the layout, or is not finite.
    """
    flat = layout.flat(params, what=what)
    for tensor, view in zip(layout.tensors, layout.views(flat), strict=True):
        if finite and not np.isfinite(view).all():
            raise not_finite(tensor.path, view, what)
    return flat


def _listed(weights: Any, count: int) -> list[Any]:
    try:
        arrays = [] if isinstance(weights, (Mapping, str)) else list(weights)
    except TypeError:  # no iterable, or an array of shape ()
        arrays = []
    if len(arrays) != count:
        got = len(arrays) if arrays or isinstance(weights, list) else kind_of(weights)
        raise StructureError(
            f"set_weights: expected {count} arrays (iterations, m_schedule, ms, vs), got {got}"
        )
    return arrays


def _weight(given: Any, shape: tuple[int, ...], space: str, *, finite: bool) -> Array:
    array = np.asarray(given) if isinstance(given, int) else as_numpy(given)
    if array.shape != shape:
        raise StructureError(f"expected shape {shape}, got shape {array.shape}")
    is_number = array.dtype in NAME_OF or array.dtype.kind in "iu"
    wrong = ~np.isfinite(array.astype(space)) if is_number else np.ones(shape, bool)
    if not is_number or (finite and wrong.any()):
        first = f" {first_of(array, wrong)}" if is_number else remedy_of(given, array.dtype)
        raise StructureError(f"expected finite {space} numbers, got {array.dtype.name}{first}")
    return array
