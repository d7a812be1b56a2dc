"""The order of arrays in a `.keras` file: that of Keras's own optimizers of the same formula.

It is iteration, learning rate if it is a number, averages, sums of micro-batches, then the first
and the second moment of each variable, and for Nadam the product of the momentum coefficients. The
product is in float64 here, and Keras's float32 is taken too. Where variables had no gradient in
some steps, their counts and products follow, of which Keras has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distnadam.errors import StructureError
from distnadam.frontends.replica import Slots
from distnadam.nadam.step_scalars import TensorClock
from distnadam.tensors.arrays import Array


@dataclass(frozen=True)
class Listed:
    """Arrays in the file's order, and the steps applied."""

    iterations: int
    ema: list[Array]
    slots: list[Array]
    clocks: list[Array]


def arrays_of(slots: Slots, names: Sequence[str], *, has_product: bool) -> Listed:
    """Return the averages, and moments with the product, in the file's order."""
    pairs = [np.asarray(each[name]) for name in names for each in (slots.m, slots.v)]
    product = [np.array(slots.m_schedule, np.float64)] if has_product else []
    ema = [np.asarray(slots.ema[name]) for name in names] if slots.ema else []
    clocks = [slots.clocks[name] for name in names] if slots.clocks else []
    counts = [np.array([clock.steps for clock in clocks], np.int64)]
    products = [np.array([clock.product for clock in clocks], np.float64)]
    return Listed(slots.iterations, ema, [*pairs, *product], [*counts, *products] if clocks else [])


def slots_of(
    arrays: Sequence[Array],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    scalars: int,
    sums: int,
    has_product: bool,
    use_ema: bool,
    per_step: int,
) -> tuple[list[Array], Slots]:
    """Return the arrays that are Keras's own, and the slots.

    Args:
        arrays: in the file's order.
        shapes: of each tensor that the shards hold, by name, in order.
        scalars: how many arrays come first.
        sums: how many sums of micro-batches there are.
        has_product: whether the last is the product.
        use_ema: whether there are averages.
        per_step: apply calls for each step.

    Raises:
        StructureError: naming the count, or the tensor whose shape is not the model's.
    """
    count = len(shapes)
    averages = count if use_ema else 0
    expected = scalars + averages + sums + 2 * count + has_product
    clocks: dict[str, TensorClock] = {}
    if len(arrays) == expected + 2 and arrays[-1].shape == arrays[-2].shape == (count,):
        told = zip(shapes, arrays[-2].tolist(), arrays[-1].tolist(), strict=True)
        clocks = {name: TensorClock(steps, product) for name, steps, product in told}
        arrays = arrays[:-2]
    if len(arrays) != expected:
        raise StructureError(
            f"optimizer: expected {expected} arrays for {count} variables, got {len(arrays)}: it "
            "was saved by another optimizer, of another model, or with other settings of average "
            "or accumulation"
        )
    first = scalars + averages + sums
    parts = {
        "average": arrays[scalars : scalars + averages],
        "first moment": arrays[first : first + 2 * count : 2],
        "second moment": arrays[first + 1 : first + 2 * count : 2],
    }
    for what, part in parts.items():
        for (name, shape), array in zip(shapes.items(), part, strict=False):
            if array.shape != shape:
                raise StructureError(
                    f"optimizer: {what} of {name!r}: expected shape {shape}, got {array.shape}"
                )
    ema, m, v = (dict(zip(shapes, part, strict=False)) for part in parts.values())
    slots = Slots(
        iterations=int(arrays[0]) // per_step,
        m_schedule=float(arrays[-1]) if has_product else 1.0,
        m=m,
        v=v,
        ema=ema,
        clocks=clocks,
    )
    own = [*arrays[:scalars], *arrays[scalars + averages : first]]
    return own, slots
