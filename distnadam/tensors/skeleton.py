"""A tree's nesting without its arrays: each leaf is replaced by its index, dict keys sorted."""

from collections.abc import Iterator
from typing import Any

import optree

from distnadam.errors import StructureError


def skeleton_of(tree: Any) -> Any:
    """Return the tree with each leaf replaced by its index."""
    spec = optree.tree_structure(tree, none_is_leaf=True)
    return optree.tree_unflatten(spec, range(spec.num_leaves))


def in_given_order(node: Any) -> Iterator[int]:
    """Yield a skeleton's leaves in the order of its dicts' keys, unsorted."""
    if isinstance(node, int):
        yield node
        return
    for child in node.values() if isinstance(node, dict) else node:
        yield from in_given_order(child)


def encode(node: Any) -> Any:
    """Return a skeleton as plain data (for msgpack) that `decode` takes."""
    if isinstance(node, dict):
        return {"dict": [[key, encode(child)] for key, child in node.items()]}
    if isinstance(node, (list, tuple)):
        return {"list" if isinstance(node, list) else "tuple": [encode(child) for child in node]}
    return node


def decode(data: Any) -> Any:
    """Return the skeleton that `encode` described; raise StructureError where it is none."""
    if isinstance(data, int):
        return data
    kind, children = (
        next(iter(data.items())) if isinstance(data, dict) and len(data) == 1 else ("", [])
    )
    if kind == "dict":
        return {key: decode(child) for key, child in children}
    if kind in ("list", "tuple"):
        decoded = [decode(child) for child in children]
        return decoded if kind == "list" else tuple(decoded)
    raise StructureError(f"layout: expected a node of a tree, got {str(data)[:80]!r}")
