"""The step as one compiled loop (numba): mean, scale, clip and step while a block is in the
innermost cache. The only numba here.

Bit for bit what `kernels.NumPyStepper` computes: the same operations in the same order, no
contraction to fused multiply-add, no reordering, denormals kept. Compiled once per dtype and kept
on disk for later processes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from distnadam.tensors.arrays import Array

_BLOCK = 512
"""Elements of a block: all of the step's arrays together then stay in a first-level cache of 32 KiB
between mean and step.
"""
_APART = 48
"""Elements between the scratch arrays, so that they do not fall into the same sets of the cache."""

Scratch = tuple[Array, Array]


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, _address: Any, like: Any) -> Any:
    """Make a pointer to the dtype of `like` of an address, so that one compilation serves any
    number of gradients.
    """
    kind = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.uintp, like), generate


_compiled = numba.njit(nogil=True, error_model="numpy", cache=True)


@_compiled  # type: ignore[untyped-decorator]
def _gradient(addresses: Any, like: Any, begin: int, end: int, modifiers: Any, mean: Any) -> Any:
    """Return elements [begin, end) of the mean, scaled and clipped; a NaN modifier is none."""
    count, scale, limit = modifiers[0], modifiers[1], modifiers[2]
    n = end - begin
    g = numba.carray(_pointer(addresses[0], like), like.size)[begin:end]
    if addresses.size > 1:
        for i in range(n):
            mean[i] = g[i]
        for worker in range(1, addresses.size):
            other = numba.carray(_pointer(addresses[worker], like), like.size)[begin:end]
            for i in range(n):
                mean[i] = mean[i] + other[i]
        for i in range(n):
            mean[i] = mean[i] / count
        g = mean[:n]
    if scale == scale:
        for i in range(n):
            mean[i] = g[i] * scale
        g = mean[:n]
    if limit == limit:
        for i in range(n):
            x = g[i] if g[i] > -limit else -limit
            mean[i] = x if x < limit else limit
        g = mean[:n]
    return g


@_compiled  # type: ignore[untyped-decorator]
def _step(
    arrays: Any, addresses: Any, coefficients: Any, modifiers: Any, scratch: Any, keep: Any
) -> None:
    gradient, momentum, epsilon, k_1, k_2 = (
        coefficients[0],
        coefficients[1],
        coefficients[2],
        coefficients[3],
        coefficients[4],
    )
    new = scratch[1]
    for begin in range(0, arrays[0].size, _BLOCK):
        end = min(begin + _BLOCK, arrays[0].size)
        g = _gradient(addresses, arrays[0], begin, end, modifiers, scratch[0])
        if keep.size > 0:
            for i in range(end - begin):
                keep[begin + i] = g[i]
        p, m, v, out = (
            arrays[0][begin:end],
            arrays[1][begin:end],
            arrays[2][begin:end],
            arrays[3][begin:end],
        )
        for i in range(end - begin):
            moment = m[i] + (g[i] - m[i]) * k_1
            square = v[i] + (g[i] * g[i] - v[i]) * k_2
            m[i] = moment
            v[i] = square
            new[i] = p[i] - (g[i] * gradient + moment * momentum) / (np.sqrt(square) + epsilon)
        for i in range(
            end - begin
        ):  # apart, for where `out` is `p` the loop above would not be vectorised
            out[i] = new[i]


def new_scratch(dtype: Any) -> Scratch:
    """Return the working memory of one thread."""
    memory = np.empty(2 * _BLOCK + _APART, dtype)
    return memory[:_BLOCK], memory[-_BLOCK:]


def run(
    arrays: tuple[Array, Array, Array, Array],
    gradients: Sequence[Array],
    coefficients: Array,
    scale: float | None,
    clipvalue: float | None,
    scratch: Scratch,
    keep: Array | None = None,
) -> None:
    """Step `arrays` (parameters, both moments, where the new parameters go), contiguous and of one
    length and dtype.

    Args:
        arrays: as above; the last may be the first.
        gradients: arrays of the same length and dtype, averaged in their order.
        coefficients: of the gradient, of the momentum, epsilon, one minus either beta, in the
            arrays' dtype.
        scale: factor on the mean; None leaves it.
        clipvalue: largest magnitude of an element, after the scale; None does not clip.
        scratch: of `new_scratch`.
        keep: where the mean, scaled and clipped, is left; None leaves it nowhere.
    """
    addresses = np.array([g.__array_interface__["data"][0] for g in gradients], np.uintp)
    none = math.nan
    modifiers = (
        len(gradients),
        none if scale is None else scale,
        none if clipvalue is None else clipvalue,
    )
    _step(
        arrays,
        addresses,
        coefficients,
        np.array(modifiers, coefficients.dtype),
        scratch,
        scratch[0][:0] if keep is None else keep,
    )


def warm_up(dtype: Any) -> None:
    """Compile for a dtype, or load what an earlier process compiled, before the first step is timed
    or waited for.
    """
    arrays = tuple(np.ones(1, dtype) for _ in range(4))
    run(
        (arrays[0], arrays[1], arrays[2], arrays[3]),
        [np.ones(1, dtype)],
        np.ones(5, dtype),
        None,
        None,
        new_scratch(dtype),
    )
