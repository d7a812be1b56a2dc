"""The parameters as a worker sees them: read-only trees over flat arrays, its own or shared.

No shards, no Ray.
"""

from typing import Any

import numpy as np

from distnadam.tensors.arrays import Flat, dtype_of, empty_flat
from distnadam.tensors.layout import Layout, Ranges


class ParameterView:
    """Flat parameters as a read-only tree in the structure given to `build`."""

    def __init__(self, layout: Layout, flat: Flat | None = None) -> None:
        self._layout = layout
        self.flat = empty_flat(layout.sizes) if flat is None else flat
        self._views = layout.views(self.flat)
        for view in self._views:
            view.flags.writeable = False
        kept = enumerate(zip(layout.tensors, self._views, strict=True))
        self._casts = [
            (index, dtype_of(tensor.dtype))
            for index, (tensor, view) in kept
            if view.dtype.name != tensor.dtype
        ]
        self._scalars = [index for index, tensor in enumerate(layout.tensors) if tensor.shape == ()]

    def fill(self, ranges: Ranges, values: Flat) -> None:
        """Copy one shard's ranges."""
        for space, (begin, end) in ranges.items():
            np.copyto(self.flat[space][begin:end], values[space])

    def tree(self) -> Any:
        """Return the tree: views, or casts of tensors whose master has another dtype.

        A tensor of shape () is a NumPy scalar.
        """
        leaves: list[Any] = list(self._views)
        for index, dtype in self._casts:
            leaves[index] = leaves[index].astype(dtype)
            leaves[index].flags.writeable = False
        for index in self._scalars:
            leaves[index] = leaves[index][()]
        return self._layout.unflatten(leaves)


class ParameterViews:
    """The views that one worker has: one of its own memory, or one of each shared buffer."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shared: tuple[Flat, Flat] | None = None
        self._views: list[ParameterView] = []

    def of(self, shared: tuple[Flat, Flat] | None) -> list[ParameterView]:
        """Return the views, made again if the memory is another than at the last call.

        Args:
            shared: both buffers of the whole model; None means own memory.
        """
        if not self._views or self._shared is not shared:
            self._shared = shared
            flats: tuple[Flat | None, ...] = (None,) if shared is None else shared
            self._views = [ParameterView(self._layout, flat) for flat in flats]
        return self._views
