"""A worker's gradient slot: one flat array per space that a tree of gradients is copied into and judged finite. No shards, no Ray."""

from typing import Any

import numpy as np

from distnadam.arrays import Array, Flat, empty_flat
from distnadam.layout import Layout, Ranges

_BLOCK = 65536


class GradientSlot:
    """One rank's gradients, flat, reused at every step.

    `who` begins the sentence of a complaint, such as "worker 1".
    """

    def __init__(self, layout: Layout, who: str) -> None:
        self._layout, self._who = layout, who
        self.flat: Flat = empty_flat(layout.sizes)
        self._views = layout.views(self.flat)

    def fill(self, gradients: Any) -> str | None:
        """Copy a tree of gradients in, cast to the spaces' dtypes; return a complaint naming the first tensor that is not usable, or None.

        Raises:
            StructureError: a tensor's path, shape or dtype is not the model's.
        """
        leaves = self._layout.leaves(gradients, what=f"{self._who}: gradients")
        complaint = None
        with np.errstate(over="ignore"):  # a cast that overflows is judged like any infinity
            for tensor, view, leaf in zip(self._layout.tensors, self._views, leaves, strict=True):
                np.copyto(view, leaf, casting="same_kind")
                if complaint is None and (fault := _fault(view)) is not None:
                    complaint = f"{self._who}: gradient {tensor.path!r} {fault}"
        return complaint

    def ranges(self, ranges: Ranges) -> Flat:
        """Return views of one shard's ranges."""
        return {space: self.flat[space][begin:end] for space, (begin, end) in ranges.items()}


def _fault(values: Array) -> str | None:
    """Say what is wrong with the first value that is not finite or whose square overflows; None where all are usable.

    A block's dot product with itself is finite only if every element and square is; only a block that fails it is looked through.
    """
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, flat.size, _BLOCK):
            block = flat[begin : begin + _BLOCK]
            if not np.isfinite(np.dot(block, block)):
                bad = ~np.isfinite(np.square(block))
                if bad.any():
                    index = begin + int(bad.argmax())
                    where = tuple(int(i) for i in np.unravel_index(index, values.shape))
                    return f"is not finite, or its square overflows, at index {where}: {flat[index]!r}"
    return None
