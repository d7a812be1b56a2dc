"""The parameters as a worker sees them: read-only trees over flat arrays, its own or shared. No shards, no Ray."""

from typing import Any

import numpy as np

from distnadam.arrays import Flat, dtype_of, empty_flat
from distnadam.layout import Layout, Ranges


class ParameterView:
    """Flat parameters as a read-only tree in the structure given to `build`."""

    def __init__(self, layout: Layout, flat: Flat | None = None) -> None:
        self._layout = layout
        self.flat = empty_flat(layout.sizes) if flat is None else flat
        self._views = layout.views(self.flat)
        for view in self._views:
            view.flags.writeable = False

    def fill(self, ranges: Ranges, values: Flat) -> None:
        """Copy one shard's ranges in."""
        for space, (begin, end) in ranges.items():
            np.copyto(self.flat[space][begin:end], values[space])

    def tree(self) -> Any:
        """Return the tree: views where a tensor is kept in its own dtype, casts where not, NumPy scalars for shape ()."""
        leaves: list[Any] = []
        for tensor, view in zip(self._layout.tensors, self._views, strict=True):
            leaf = view
            if view.dtype.name != tensor.dtype:
                leaf = view.astype(dtype_of(tensor.dtype))
                leaf.flags.writeable = False
            leaves.append(leaf if leaf.shape else leaf[()])
        return self._layout.unflatten(leaves)
