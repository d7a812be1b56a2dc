"""The parameters as a worker sees them: read-only trees over flat arrays, its own or shared.

No shards, no Ray.
"""

from typing import Any

import numpy as np

from distnadam.tensors.arrays import Array, Flat, dtype_of, empty_flat, own_errors
from distnadam.tensors.layout import Layout, Ranges
from distnadam.tensors.reused_tree import ReusedTree


class ParameterView:
    """One worker's parameters as read-only trees in the structure given to `build`: over memory of
    its own, or over either of two shared buffers.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._own: Flat = {}
        self._shared: tuple[Flat, Flat] | None = None
        self._views: list[list[Array]] = []  # of the own memory, or of each shared buffer
        self._trees: list[ReusedTree] = []
        self._casts = [
            (index, dtype_of(tensor.dtype))
            for index, tensor in enumerate(layout.tensors)
            if tensor.space != tensor.dtype and layout.pull_dtypes[tensor.space] == tensor.space
        ]
        self._scalars = [index for index, tensor in enumerate(layout.tensors) if tensor.shape == ()]

    @property
    def has_own(self) -> bool:
        """Whether parameters have been copied into the view's own memory."""
        return bool(self._own)

    def fill(self, ranges: Ranges, values: Flat) -> None:
        """Copy one shard's ranges into the view's own memory."""
        if not self._own:
            self._own = empty_flat(self._layout.sizes, self._layout.pull_dtypes)
        for space, (begin, end) in ranges.items():
            np.copyto(self._own[space][begin:end], values[space])

    def tree(self, shared: tuple[Flat, Flat] | None, buffer: int) -> Any:
        """Return the tree: views, or casts of tensors whose master has another dtype, unless
        workers see that master rounded.

        A tensor of shape () is a NumPy scalar.

        Args:
            shared: both buffers of the whole model; None for the view's own memory.
            buffer: which of the two.
        """
        if not self._views or self._shared is not shared:
            self._look_at(shared)
        number = 0 if shared is None else buffer
        if not (self._casts or self._scalars):
            return self._trees[number].get()
        leaves: list[Any] = list(self._views[number])
        if self._casts:
            with own_errors():
                for index, dtype in self._casts:
                    leaves[index] = leaves[index].astype(dtype)
                    leaves[index].flags.writeable = False
        for index in self._scalars:
            leaves[index] = leaves[index][()]
        return self._layout.unflatten(leaves)

    def _look_at(self, shared: tuple[Flat, Flat] | None) -> None:
        flats = (self._own,) if shared is None else shared
        self._shared = shared
        self._views = [self._layout.views(flat) for flat in flats]
        for view in self._views:
            for array in view:
                array.flags.writeable = False
        spec, unflatten = self._layout.plain_spec, self._layout.unflatten
        self._trees = [ReusedTree(spec, unflatten(view)) for view in self._views]
