"""The containers of a layout's trees: picks the leaves of a tree that has exactly these, and copies
a tree's containers, by a few calls of C. Other trees are left to optree.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

MANY = 256
"""Children from which on looking at their keys in order is worth it."""


class PlainSpec:
    """One container of a skeleton and those in it, or a single leaf.

    Args:
        skeleton: a tree of dicts, lists and tuples whose leaves are their indices.
    """

    def __init__(self, skeleton: Any) -> None:
        self._kind = type(skeleton)
        self._is_leaf = isinstance(skeleton, int)
        self._count = 1 if self._is_leaf else len(skeleton)
        self._keys: list[Any] = []  # of the children, in the order of their leaves
        self._inner: dict[Any, PlainSpec] = {}  # by key, the containers among them
        if self._is_leaf:
            return
        items = skeleton.items() if self._kind is dict else enumerate(skeleton)
        self._inner = {k: PlainSpec(child) for k, child in items if not isinstance(child, int)}
        children = skeleton if self._kind is dict else dict(enumerate(skeleton))
        self._keys = sorted(children, key=lambda key: _first_leaf(children[key]))
        self._children: Callable[[Any], Sequence[Any]] | None = (
            itemgetter(*self._keys) if self._count > 1 else None
        )

    def pick(self, tree: Any) -> Sequence[Any] | None:
        """Return the tree's leaves, of whatever type, in the order of their indices; None if its
        containers are others.
        """
        if self._is_leaf:
            return [tree]
        if type(tree) is not self._kind or len(tree) != self._count:
            return None
        children: Sequence[Any]
        if self._count >= MANY and self._kind is dict and list(tree) == self._keys:
            children = list(tree.values())  # in order, so no key is looked up
        else:
            try:
                children = (
                    [tree[key] for key in self._keys]
                    if self._children is None
                    else self._children(tree)
                )
            except KeyError:
                return None
        if not self._inner:
            return children
        leaves: list[Any] = []
        for key, child in zip(self._keys, children, strict=True):
            if (inner := self._inner.get(key)) is None:
                leaves.append(child)
            elif (found := inner.pick(child)) is None:
                return None
            else:
                leaves += found
        return leaves

    @property
    def has_dicts_alone(self) -> bool:
        """Whether all containers are dicts, and there is one."""
        return self._kind is dict and all(each.has_dicts_alone for each in self._inner.values())

    def dicts(self, tree: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Return the containers of a tree of these, all of them dicts, from the root on."""
        found = [tree]
        for key, inner in self._inner.items():
            found += inner.dicts(tree[key])
        return found

    def copied(self, tree: Any) -> Any:
        """Return a tree of these containers as new ones with the same leaves."""
        if self._kind is dict:
            return {**tree, **{k: inner.copied(tree[k]) for k, inner in self._inner.items()}}
        if self._kind is list or self._inner:
            children = list(tree)
            for index, inner in self._inner.items():
                children[index] = inner.copied(tree[index])
            return self._kind(children)
        return tree


def _first_leaf(node: Any) -> float:
    """Return the least index in a node, that of its first leaf; infinity where it has none."""
    if isinstance(node, int):
        return node
    children = node.values() if isinstance(node, dict) else node
    return min(map(_first_leaf, children), default=float("inf"))
