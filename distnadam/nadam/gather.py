"""Many arrays of a tree copied into flat memory by one compiled call, which finds them in it and
looks at each first: its type, dtype, shape and memory.

It reads the objects themselves, as every extension module does. Where these are not as it knows
them, or nothing can be compiled, there is no such call, and NumPy does it, to the same bits.
"""

import ctypes
import logging
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distnadam.nadam import gather_abi as abi
from distnadam.nadam.object_code import cached_code, loaded_code
from distnadam.nadam.tree_table import TreeTable
from distnadam.tensors.arrays import Array

log = logging.getLogger("distnadam")

_SOURCES = [
    Path(__file__).with_name(f"{name}.py") for name in ("gather_loop", "gather_abi", "instructions")
]
_loaded: dict[str, Callable[..., int] | None] = {}
_loading = threading.Lock()


class Leaves(NamedTuple):
    """Leaves [first, last) of a tree, and where their elements go, one leaf after the other.

    Attributes:
        first: the first one's index.
        shapes: what each must be of, from that one on.
        target: 1-D, contiguous, of as many elements, of the leaves' dtype.
    """

    first: int
    shapes: Sequence[tuple[int, ...]]
    target: Array


class Gather:
    """Copies some leaves of trees, where `can_gather` their dtype.

    Args:
        table: the trees' containers.
        leaves: which leaves, all of one dtype.
    """

    def __init__(self, table: TreeTable, leaves: Sequence[Leaves]) -> None:
        dtype = leaves[0].target.dtype
        copy = _load_gather(dtype.name)
        assert copy is not None
        shapes = [
            np.array([number for shape in each.shapes for number in (len(shape), *shape)], np.int64)
            for each in leaves
        ]
        firsts = [table.slot_of(each.first) for each in leaves]
        rows = [
            (first, first + len(each.shapes), sizes.ctypes.data, each.target.ctypes.data)
            for first, each, sizes in zip(firsts, leaves, shapes, strict=True)
        ]
        runs, self._results = np.array(rows, np.int64), np.zeros(len(rows), np.int64)
        types = map(id, (dict, list, str, np.ndarray, dtype))
        constants = np.array([*_called(), *types, dicts_are_as_known()], np.int64)
        tables = table.slots, table.containers, table.keys, table.places
        self._kept = tables, runs, constants, shapes, leaves  # which the call has the addresses of
        slots, containers, keys, places = (each.ctypes.data for each in tables)
        self._copy = copy
        self._arguments = (
            *(slots, containers, len(table.containers), keys, places),
            *(runs.ctypes.data, len(rows), self._results.ctypes.data, constants.ctypes.data),
        )

    def copy(self, tree: Any) -> int:
        """Copy the leaves of a tree; return what `gather_abi` says."""
        return self._copy(tree, *self._arguments)

    @property
    def large(self) -> Sequence[int]:
        """Which of the leaves that the last call has copied are LARGE together, by their index."""
        return [*map(int, np.flatnonzero(self._results))]


def can_gather(dtype: str) -> bool:
    """Whether leaves of a dtype can be copied so here."""
    return _load_gather(dtype) is not None


def _called() -> Sequence[int]:
    """Return the addresses of the interpreter's functions that are called."""
    functions = ctypes.pythonapi.PyDict_Next, ctypes.pythonapi.PyUnicode_Compare
    return [ctypes.cast(each, ctypes.c_void_p).value or 0 for each in functions]


def _load_gather(dtype: str) -> Callable[..., int] | None:
    """Return the compiled copy for a dtype, compiled first if no process has yet; None where there
    can be none.
    """
    with _loading:
        if dtype not in _loaded:
            _loaded[dtype] = _load(dtype) if _are_as_known(dtype) else None
        return _loaded[dtype]


def _load(dtype: str) -> Callable[..., int] | None:
    try:
        code = cached_code(_SOURCES, dtype, lambda: _compile(dtype))
        return loaded_code(code, abi.ENTRY, abi.PROTOTYPE)
    except Exception as error:  # the compiler's are of many classes, and it may not be importable
        log.debug("leaves are copied by NumPy: %s: %s", type(error).__name__, error)
        return None


def _compile(dtype: str) -> bytes:
    from distnadam.nadam.gather_loop import compile_gather

    return compile_gather(dtype)


def _are_as_known(dtype: str) -> bool:
    """Whether lists and arrays lie in memory as `gather_abi` says: seen in some."""
    if (
        sys.implementation.name != "cpython"
        or sysconfig.get_config_var("Py_GIL_DISABLED")
        or ctypes.sizeof(ctypes.c_void_p) != 8
        or list.__basicsize__ < abi.ITEMS + 8
        or np.ndarray.__basicsize__ < abi.FLAGS + 4
    ):
        return False
    whole = np.zeros((2, 3, 5), dtype)
    some = [whole, whole[1:, :, 1:], whole[:0], np.zeros((), dtype), whole.T, np.zeros(3, ">f8")]
    as_tuple, items = tuple(some), _number(some, abi.ITEMS)
    return _number(some, abi.SIZE) == _number(as_tuple, abi.SIZE) == len(some) and all(
        _number_at(items + 8 * place) == _number(as_tuple, abi.ITEMS + 8 * place) == id(array)
        and _is_as_known(array)
        for place, array in enumerate(some)
    )


@cache
def dicts_are_as_known() -> bool:
    """Whether the items of dicts lie in memory as `gather_abi` says: seen in some, of versions of
    the interpreter in whose headers it is so.
    """
    if not (3, 11) <= sys.version_info < (3, 15) or dict.__basicsize__ != abi.VALUES + 8:
        return False
    lacking = {"a": 1, "b": 2, "c": 3}
    del lacking["b"]
    others: Sequence[dict[Any, Any]] = {1: 2}, {"a": 1, 2: 3}, lacking, vars(_Empty())
    return (
        all(_lies_open({f"key {i}": object() for i in range(n)}) for n in (1, 5, 40, 300))
        and not any(_lies_open(each) for each in others)
        and _lies_open(dict(lacking))
    )


class _Empty:
    """Its instances have dicts of which some lie otherwise."""

    def __init__(self) -> None:
        self.a, self.b = 1, 2


def _lies_open(of: dict[Any, Any]) -> bool:
    """Whether a dict's items are found where those of one of strings would lie."""
    if _number(of, abi.SIZE) != len(of) or _number(of, abi.VALUES) != 0:
        return False
    table = _number(of, abi.KEYS)
    kind, bits = (
        ctypes.c_uint8.from_address(table + at).value for at in (abi.KIND, abi.INDEX_BITS)
    )
    if kind != abi.STRINGS or _number_at(table + abi.ENTRIES) != len(of) or bits > 32:
        return False
    entries = table + abi.INDICES + (1 << bits)
    if entries + 16 * len(of) - table > sys.getsizeof(of) - dict.__basicsize__:
        return False  # it would end behind the table
    return all(
        (_number_at(entries + 16 * k), _number_at(entries + 16 * k + 8)) == (id(key), id(value))
        for k, (key, value) in enumerate(of.items())
    )


def _is_as_known(array: Array) -> bool:
    flags, readable = array.flags, _number(array, abi.FLAGS) & abi.READABLE
    return (
        _number(array, abi.TYPE) == id(type(array))
        and _number(array, abi.DATA) == array.ctypes.data
        and _number(array, abi.DESCR) == id(array.dtype)
        and _number(array, abi.DIMENSIONS) & 0xFFFFFFFF == array.ndim
        and (readable == abi.READABLE) == (flags.c_contiguous and flags.aligned)
        # the last, since an address is followed, which lies among the others
        and all(
            _number_at(_number(array, abi.SHAPE) + 8 * k) == size
            for k, size in enumerate(array.shape)
        )
    )


def _number(of: Any, at: int) -> int:
    return _number_at(id(of) + at)


def _number_at(address: int) -> int:
    return ctypes.c_ssize_t.from_address(address).value
