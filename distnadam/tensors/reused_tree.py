"""Trees that are handed out again, where nobody can tell: nobody has any of their dicts, and nobody
has changed one. A model of many tensors has its containers made anew only if somebody keeps them.

CPython counts a dict's changes in the dict itself (PEP 509). Where it does not, or a tree has other
containers than dicts, each tree is a new one.
"""

import ctypes
import sys
from functools import cache
from operator import attrgetter
from typing import Any

from distnadam.tensors.plain_spec import PlainSpec

_VERSION = 24
"""Bytes from an object's beginning to a dict's count of changes: behind its own and its length, in
the header cpython/dictobject.h of 3.11.
"""
_value_of = attrgetter("value")


class ReusedTree:
    """Gives a tree out, as often as it is asked for, in containers of whoever asks.

    Args:
        spec: the tree's containers.
        tree: with the leaves that are given out; it is kept as it is.
    """

    def __init__(self, spec: PlainSpec, tree: Any) -> None:
        self._spec = spec
        self._tree = tree
        self._is_able = spec.has_dicts_alone and _versions_are_known()
        self._dicts: list[dict[Any, Any]] = []  # of the last that was given out, from the root
        self._versions: list[Any] = []  # of each, in its own memory
        self._seen: list[int] = []  # these, when it was given out
        self._references: list[int] = []  # to each then, but for those of whom it was given to

    def get(self) -> Any:
        """Return the tree in containers that nobody else has."""
        if not self._is_able:
            return self._spec.copied(self._tree)
        dicts = self._dicts
        if not (
            dicts
            and list(map(sys.getrefcount, dicts)) == self._references
            and list(map(_value_of, self._versions)) == self._seen
        ):
            self._versions = []  # of dicts that may go
            dicts = self._dicts = self._spec.dicts(self._spec.copied(self._tree))
            self._references = list(map(sys.getrefcount, dicts))
            self._versions = list(map(_version, dicts))
            self._seen = list(map(_value_of, self._versions))
        return dicts[0]


def _version(of: dict[Any, Any]) -> Any:
    """Return a dict's count of changes where it lies."""
    return ctypes.c_uint64.from_address(id(of) + _VERSION)


@cache
def _versions_are_known() -> bool:
    """Whether a dict's count of changes is where it was in 3.11: seen in one."""
    if sys.implementation.name != "cpython" or dict.__basicsize__ < _VERSION + 16:
        return False
    one: dict[Any, Any] = {"a": 1, "b": 2, "c": 3}
    version = _version(one)
    reads = (lambda: one["b"], lambda: one.get("z"), lambda: [*one], lambda: {**one}, one.copy)
    writes = (
        lambda: one.update(a=4),
        lambda: one.__setitem__("a", 5),
        lambda: one.__delitem__("a"),
        lambda: one.setdefault("d", 6),
        lambda: one.pop("b"),
        one.popitem,
        lambda: one.__ior__({"e": 7}),
        one.clear,
        lambda: one.update(f=8),
    )
    for does, changes in ((reads, False), (writes, True)):
        for each in does:
            before = version.value
            each()
            if (version.value != before) is not changes:
                return False
    return True
