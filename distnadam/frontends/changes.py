"""What a framework has changed of the parameters that it holds, between two steps."""

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from distnadam.client.shard_group import ShardGroup
from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout

_SHOWN = 4


def in_words(changed: Sequence[tuple[str, str]]) -> str:
    """Return changed tensors, each a name and a digest of its bits, as a rank says them to the
    others.

    >>> in_words([("w", "1f"), ("b", "2e")])
    "'w' (1f), 'b' (2e)"
    """
    each = [f"{name!r} ({bits})" for name, bits in changed]
    shown = ", ".join(each[:_SHOWN])
    if len(each) <= _SHOWN:
        return shown
    return (
        f"{shown} and {len(each) - _SHOWN} more ({digest_bytes(''.join(each[_SHOWN:]).encode())})"
    )


def digest_bytes(data: bytes) -> str:
    """Return a digest of bytes in a few letters."""
    return xxhash.xxh3_64_hexdigest(data)[:8]


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


def differing(held: Mapping[str, Array], params: Mapping[str, Array]) -> list[str]:
    """Return the names of the tensors whose bits differ."""
    each = params.items()
    return [name for name, array in each if not same_bits(np.asarray(held[name]), array)]


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays of one shape have the same dtype and bits.

    >>> same_bits(np.array([0.0]), np.array([-0.0])), same_bits(np.array(1.0), np.array(1.0))
    (False, True)
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    kind = f"u{one.dtype.itemsize}"
    return bool(np.array_equal(np.asarray(one).view(kind), np.asarray(other).view(kind)))
