"""The shards' parameters, where a framework has changed some of what it holds of them."""

import numpy as np

from distnadam.client.shard_group import ShardGroup
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Layout


def is_rounded(layout: Layout) -> bool:
    """Whether a framework holds tensors rounded, of which the shards have exact masters."""
    spaces = any(space != dtype for space, dtype in layout.pull_dtypes.items())
    return spaces or any(tensor.dtype != tensor.space for tensor in layout.tensors)


def with_changed(shards: ShardGroup, params: Flat, changed: frozenset[str]) -> Flat:
    """Return the whole parameters, of which only changed tensors become what a framework holds.

    Of the others it may hold rounded numbers, whose masters are exact.

    Args:
        shards: hold the masters.
        params: what the framework holds.
        changed: the paths of the tensors that it has changed.
    """
    layout = shards.layout
    if not is_rounded(layout):
        return params
    masters = shards.read(("params",))[1]["params"]
    views = layout.views(params), layout.views(masters)
    for tensor, held, master in zip(layout.tensors, *views, strict=True):
        if tensor.path in changed:
            np.copyto(master, held)
    return masters
