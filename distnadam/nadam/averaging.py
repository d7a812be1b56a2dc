"""The exponential moving average of the parameters, after a step: one code for every kernel."""

from dataclasses import dataclass

import numpy as np

from distnadam.hyperparameters import NadamConfig
from distnadam.tensors.arrays import Array, own_errors, round_into

_BLOCK_BYTES = 128 * 1024
"""Bytes of one block of one array: three of them stay in a second-level cache."""


@dataclass(frozen=True)
class Averaging:
    """What one step does to the average.

    Attributes:
        momentum: the weight of the average so far; None begins it with the new parameters.
        overwrites: whether the parameters become the average then.
    """

    momentum: float | None
    overwrites: bool


def averaging_of(config: NadamConfig, own: int, t: int) -> Averaging:
    """Return what step t of the optimizer, which is a tensor's own one, does to its average; both
    are counted from 1.
    """
    every = config.ema_overwrite_frequency
    return Averaging(
        momentum=config.ema_momentum if own > 1 else None,
        overwrites=every is not None and t % every == 0,
    )


@own_errors()
def update_average(
    how: Averaging, average: Array, p: Array, rounded: Array | None, begin: int, end: int
) -> None:
    """Update elements [begin, end) of the average by the new parameters, block by block.

    Both weights are in the arrays' dtype and add up to 1 there, as in Keras, so that an average of
    equal parameters does not drift away from them.

    Args:
        how: the step's.
        average: updated in place.
        p: the new parameters, which become the average if `how` says so.
        rounded: where these are a second time, rounded; None for nowhere.
        begin: the first element.
        end: the first behind them.
    """
    block = _BLOCK_BYTES // p.itemsize
    scratch = np.empty(min(block, end - begin), p.dtype)
    if how.momentum is not None:
        old = p.dtype.type(how.momentum)
        new = p.dtype.type(1) - old
    for low in range(begin, end, block):
        high = min(low + block, end)
        e, x, weighted = average[low:high], p[low:high], scratch[: high - low]
        if how.momentum is None:
            np.copyto(e, x)
        else:
            np.multiply(e, old, out=e)
            np.multiply(x, new, out=weighted)
            np.add(e, weighted, out=e)
        if how.overwrites:
            np.copyto(x, e)
            if rounded is not None:
                round_into(rounded[low:high], x)
