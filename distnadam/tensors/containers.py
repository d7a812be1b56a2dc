"""The containers of a tree: dicts, lists and tuples alone, of names that a checkpoint can hold."""

from collections import OrderedDict, defaultdict
from typing import Any

import optree

from distnadam.errors import StructureError

MOST_LEVELS = 100
"""How deep containers may be nested in a tree; a dict of arrays has one level."""
_MOST_SHOWN = 80


def plain_tree(params: Any) -> Any:
    """Return the tree made of dicts, lists and tuples alone.

    Raises:
        StructureError: naming the path of a container or key that a checkpoint cannot hold.
    """
    return _plain(params, "", 0)


def _plain(node: Any, path: str, level: int) -> Any:
    if optree.tree_is_leaf(node, none_is_leaf=True):
        return node
    where = repr(path[:_MOST_SHOWN]) if path else "the root"
    if type(node) not in (dict, OrderedDict, defaultdict, list, tuple):
        raise StructureError(
            f"params: {where}: expected a dict, list or tuple, got {type(node).__name__}"
        )
    if level >= MOST_LEVELS:
        raise StructureError(
            f"params: {where}: expected at most {MOST_LEVELS} levels of containers, got more"
        )
    below = f"{path}/" if path else ""
    if not isinstance(node, dict):
        return type(node)(_plain(child, f"{below}{i}", level + 1) for i, child in enumerate(node))
    for key in node:
        if (fault := _fault(key, below)) is not None:
            raise StructureError(f"params: {fault}")
    return {key: _plain(child, f"{below}{key}", level + 1) for key, child in node.items()}


def _fault(key: object, below: str) -> str | None:
    """Return why no checkpoint can hold a key, or None."""
    if isinstance(key, int) and not -(1 << 63) <= key < 1 << 64:
        return f"'{below}{hex(key)[:_MOST_SHOWN]}': expected an int of at most 64 bits; use a str"
    if not isinstance(key, (str, int)):
        return f"'{below}{key}': expected keys of str or int, got {type(key).__name__}"
    try:
        str(key).encode()
    except UnicodeEncodeError:
        return f"{below + str(key)!r}: expected a key that UTF-8 can say, got a lone surrogate"
    return None
