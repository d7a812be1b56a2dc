"""A tree's containers as tables of numbers, by which compiled code finds the leaves of trees with
the same containers (`gather_abi` says what is in them).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

_NO_KEY = object()
"""What stands in the table for a key that is not known."""


class _Container(NamedTuple):
    """Its slot, its type, its children's slots by key, and those of the containers among them."""

    slot: int
    kind: type[Any]
    children: dict[Any, int]
    inner: dict[Any, int]


class TreeTable:
    """The tables of one tree's containers; a dict's keys are known as the objects that they were,
    and in the order that they had, in the tree that was learnt last.

    Args:
        skeleton: a tree of dicts, lists and tuples whose leaves are their indices.
        leaves: how many it has.

    Attributes:
        containers, keys, places, slots: the tables, which stay where they lie.
    """

    def __init__(self, skeleton: Any, leaves: int) -> None:
        self._all: list[_Container] = []
        todo = [] if isinstance(skeleton, int) else [(0, skeleton)]
        for slot, node in todo:  # which grows
            children: dict[Any, int] = {}
            for key, child in node.items() if type(node) is dict else enumerate(node):
                if isinstance(child, int):
                    children[key] = child + 1
                else:
                    children[key] = leaves + len(todo)
                    todo.append((children[key], child))
            inner = {key: slot for key, slot in children.items() if slot > leaves}
            self._all.append(_Container(slot, type(node), children, inner))
        counts = [len(each.children) for each in self._all]
        self._firsts = [*accumulate(counts, initial=0)]
        rows = [
            (each.slot, id(each.kind), count, first)
            for each, count, first in zip(self._all, counts, self._firsts, strict=False)
        ]
        self.containers = np.array(rows, np.int64)
        self.keys, self.places = np.zeros((2, sum(counts)), np.int64)
        self.slots = np.zeros(leaves + len(rows), np.int64)
        self._known: list[Sequence[Any]] = []  # the keys, which `keys` has the addresses of
        self.learn(skeleton)

    def slot_of(self, leaf: int) -> int:
        """Return the slot of a leaf."""
        return leaf + 1 if self._all else leaf

    def learn(self, tree: Any) -> bool:
        """Know a tree's keys from now on; return False, if it has other containers."""
        found: dict[int, Any] = {0: tree}
        known: list[Sequence[Any]] = []
        places: list[int] = []
        for slot, kind, children, inner in self._all:
            each = found[slot]
            if type(each) is not kind or len(each) != len(children):
                return False
            keys: Sequence[Any] = [*each] if kind is dict else range(len(each))
            if not all(map(children.__contains__, keys)):
                return False
            known.append(keys)
            places += map(children.__getitem__, keys)
            found |= {slot: each[key] for key, slot in inner.items()}
        self.keys[:] = id(_NO_KEY)  # before the objects go that have these addresses
        self._known, self.places[:] = known, places
        for keys, first in zip(known, self._firsts, strict=False):
            if type(keys) is list:
                self.keys[first : first + len(keys)] = [*map(id, keys)]
        return True
