"""Many arrays copied into one by one compiled call, which looks at each first: its type, dtype,
shape and memory.

It reads the objects themselves, as every extension module does. Where these are not as it knows
them, or nothing can be compiled, there is no such call, and NumPy does it, to the same bits.
"""

import ctypes
import logging
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.nadam import gather_abi as abi
from distnadam.nadam.object_code import cached_code, loaded_code
from distnadam.tensors.arrays import Array

log = logging.getLogger("distnadam")

_SOURCES = [
    Path(__file__).with_name(f"{name}.py") for name in ("gather_loop", "gather_abi", "instructions")
]
_loaded: dict[str, Callable[..., int] | None] = {}
_loading = threading.Lock()


def gather(
    first: int, shapes: Sequence[tuple[int, ...]], target: Array
) -> Callable[[list[Any]], int] | None:
    """Return what copies some leaves of a list, one after the other, into the elements of an array;
    None where nothing can be compiled.

    It returns `gather_abi`'s OTHER where one is no NumPy array of its shape and that array's dtype,
    contiguous and aligned, and any may have been copied; LARGE where the sum of the squares of all
    is not finite, else COPIED.

    Args:
        first: the first leaf.
        shapes: what each must be of, from that one on.
        target: 1-D, contiguous, of as many elements.
    """
    copy = _load_gather(target.dtype.name)
    if copy is None:
        return None
    numbers = [number for shape in shapes for number in (len(shape), *shape)]
    kept = (ctypes.c_ssize_t * len(numbers))(*numbers), _expected(target.dtype), target
    shapes_at, expected_at = map(ctypes.addressof, kept[:2])
    found = partial(copy, first, first + len(shapes), shapes_at, target.ctypes.data, expected_at)
    found.kept = kept  # type: ignore[attr-defined]  # which it has the addresses of
    return found


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


def _expected(dtype: np.dtype[Any]) -> Any:
    return (ctypes.c_ssize_t * abi.EXPECTED)(id(np.ndarray), id(dtype))


def _are_as_known(dtype: str) -> bool:
    """Whether lists and arrays lie in memory as `gather_abi` says: seen in some."""
    if (
        sys.implementation.name != "cpython"
        or sysconfig.get_config_var("Py_GIL_DISABLED")
        or ctypes.sizeof(ctypes.c_void_p) != 8
        or list.__basicsize__ < abi.LIST_ITEMS + 8
        or np.ndarray.__basicsize__ < abi.FLAGS + 4
    ):
        return False
    whole = np.zeros((2, 3, 5), dtype)
    some = [whole, whole[1:, :, 1:], whole[:0], np.zeros((), dtype), whole.T, np.zeros(3, ">f8")]
    items = _number(some, abi.LIST_ITEMS)
    return _number(some, abi.LIST_SIZE) == len(some) and all(
        _number_at(items + 8 * place) == id(array) and _is_as_known(array)
        for place, array in enumerate(some)
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
