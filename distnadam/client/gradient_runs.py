"""Where a model's gradients lie in memory: the stretches that are copied, and looked at, as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout, TensorSpec

BLOCK = 65536
"""Elements copied at a time, and checked while they are in the cache."""
LENT = 4 * BLOCK
"""Elements of a tensor from which on it is read where it lies: of fewer the copy costs less than
what else that takes.
"""


@dataclass(frozen=True)
class Run:
    """Tensors [first, last) of a layout, which lie one after the other in elements [begin, end) of
    a space: small ones, that are copied by one call, or one that is larger than a block.
    """

    first: int
    last: int
    space: str
    begin: int
    end: int
    is_large: bool


def runs_of(layout: Layout) -> list[Run]:
    """Return the runs that the tensors of a layout make up, in order, but the frozen ones."""
    runs: list[Run] = []
    for index, tensor in enumerate(layout.tensors):
        if index in layout.frozen:
            continue
        last = runs[-1] if runs and runs[-1].last == index else None
        if last is not None and last.space == tensor.space and tensor.end - last.begin <= BLOCK:
            runs[-1] = replace(last, last=index + 1, end=tensor.end)
        else:
            bounds = tensor.begin, tensor.end
            is_large = tensor.end - tensor.begin > BLOCK
            runs.append(Run(index, index + 1, tensor.space, *bounds, is_large))
    return runs


def trained_stretches(layout: Layout) -> dict[str, list[tuple[int, int]]]:
    """Return for each space the stretches of elements that no frozen tensor has."""
    found: dict[str, list[tuple[int, int]]] = {space: [] for space in layout.sizes}
    for index, tensor in enumerate(layout.tensors):
        stretches = found[tensor.space]
        if index in layout.frozen:
            continue
        if stretches and stretches[-1][1] == tensor.begin:
            stretches[-1] = stretches[-1][0], tensor.end
        else:
            stretches.append((tensor.begin, tensor.end))
    return found


def narrow_in(layout: Layout) -> list[int]:
    """Return the tensors of the float32 space that have elements and are not frozen."""
    return [
        index
        for index, tensor in enumerate(layout.tensors)
        if tensor.space == "float32" and tensor.begin < tensor.end and index not in layout.frozen
    ]


def large_in(layout: Layout) -> list[tuple[int, TensorSpec]]:
    """Return the tensors that may be lent: large ones that are not frozen."""
    return [
        (index, tensor)
        for index, tensor in enumerate(layout.tensors)
        if tensor.end - tensor.begin >= LENT and index not in layout.frozen
    ]


def copied_apart(memory: Flat, leaves: Sequence[Array], views: Sequence[Array]) -> list[Array]:
    """Return leaves of which none changes while all are copied, in order, into views of the memory:
    a copy of each that lies in it, but in another tensor's place or another dtype.
    """
    return [
        leaf
        if leaf is view
        or not any(np.may_share_memory(leaf, flat) for flat in memory.values())
        or _is_same(leaf, view)
        else leaf.copy()
        for leaf, view in zip(leaves, views, strict=True)
    ]


def _is_same(one: Array, other: Array) -> bool:
    return (one.ctypes.data, one.strides, one.dtype) == (
        other.ctypes.data,
        other.strides,
        other.dtype,
    )


def not_finite(layout: Layout, space: str, values: Array, begin: int) -> str | None:
    """Return which of a space's elements, from `begin` on, is the first that is not finite, or
    whose square overflows in the dtype of the space; None if there is none.

    A block's dot product with itself is finite only if every element and square is; only a block
    that fails this is searched.
    """
    for low in range(0, values.size, BLOCK):
        wide = values[low : low + BLOCK].astype(space, copy=False)
        if not math.isfinite(wide.dot(wide)):
            bad = ~np.isfinite(np.square(wide))
            if bad.any():
                first = low + int(bad.argmax())
                return _describe(layout, space, begin + first, values[first])
    return None


def _describe(layout: Layout, space: str, offset: int, value: Any) -> str:
    tensor = next(t for t in layout.tensors if t.space == space and t.begin <= offset < t.end)
    where = tuple(int(i) for i in np.unravel_index(offset - tensor.begin, tensor.shape))
    return (
        f"gradient {tensor.path!r} is not finite, or its square overflows, at index {where}: "
        f"{value!r}"
    )
