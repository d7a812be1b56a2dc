"""A copy of an object, in this process, as another process would get it.

It is made by pickling, as what is sent to a Ray actor is: whatever the object refers to is copied
with it. What a process has once (modules, classes, functions) and what nobody can change (arrays
that cannot be written) is shared. Pure.
"""

import io
import pickle
import sys
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
from typing_extensions import override

from distnadam.errors import ConfigError

_T = TypeVar("_T")


def copied(value: _T, what: str) -> _T:
    """Return a copy of `value` that shares nothing with it that either could change.

    Functions defined in functions, and lambdas, are copied with what they refer to. What is shared
    is as above; so an attribute of a class, or a module's global, is shared too.

    Args:
        value: anything that can be pickled, its class and functions in any place.
        what: names it in the error.

    Raises:
        ConfigError: beginning with `what`: it holds something that cannot be copied.

    >>> task = {"seen": [], "data": np.zeros(3)}
    >>> same = copied(task, "the task")
    >>> same["seen"].append(1)
    >>> task["seen"]
    []
    """
    pickled, shared = io.BytesIO(), list[Any]()
    try:
        _Pickler(pickled, shared).dump(value)
        result: _T = _Unpickler(pickled.getbuffer(), shared).load()
    except Exception as error:  # of the methods of whatever is copied
        raise ConfigError(
            f"{what}: cannot be copied, as every worker needs a copy of its own: "
            f"{type(error).__name__}: {error}; make what cannot be copied (a lock, an open file or "
            "connection, a generator) where it is first used, or leave it out in __getstate__"
        ) from error
    return result


class _Pickler(pickle.Pickler):
    """Pickles all but what is shared, which goes to a list."""

    def __init__(self, file: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._shared = shared

    @override
    def persistent_id(self, obj: Any) -> int | None:
        if not _is_shared(obj):
            return None
        self._shared.append(obj)
        return len(self._shared) - 1

    @override
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CellType):
            return CellType, (), _contents(obj), None, None, _fill
        if isinstance(obj, FunctionType):
            state = obj.__defaults__, obj.__kwdefaults__, obj.__dict__
            made_of = _Globals(obj.__globals__), obj.__code__, obj.__name__, obj.__closure__
            return _function, made_of, state, None, None, _finish
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Loads what a `_Pickler` wrote, and what it shares."""

    def __init__(self, pickled: Any, shared: list[Any]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._shared = shared

    @override
    def persistent_load(self, pid: int) -> Any:
        return self._shared[pid]


class _Globals:
    """A module's globals, which its functions share."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace


def _is_shared(obj: Any) -> bool:
    if isinstance(obj, np.ndarray):
        return _is_constant(obj)
    if isinstance(obj, FunctionType):
        return _is_global(obj)
    if isinstance(obj, BuiltinFunctionType):
        return obj.__self__ is None or isinstance(obj.__self__, ModuleType)
    return isinstance(obj, (type, ModuleType, CodeType, _Globals, np.ufunc))


def _is_constant(array: np.ndarray[Any, Any]) -> bool:
    """Whether nobody can write to an array's memory, nor to any array that is in it."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable or owner.dtype.hasobject:
            return False
        if isinstance(owner, np.memmap):
            return True  # the file's
        owner = owner.base
    return owner is None or isinstance(owner, bytes)


def _is_global(function: FunctionType) -> bool:
    """Whether a function is found by its name in its module, as pickling it takes."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _contents(cell: CellType) -> tuple[Any] | None:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return None


def _fill(cell: CellType, contents: tuple[Any]) -> None:
    cell.cell_contents = contents[0]


def _function(
    of: _Globals, code: CodeType, name: str, closure: tuple[CellType, ...] | None
) -> FunctionType:
    return FunctionType(code, of.namespace, name, None, closure)


def _finish(function: FunctionType, state: tuple[Any, Any, dict[str, Any]]) -> None:
    function.__defaults__, function.__kwdefaults__, attributes = state
    function.__dict__.update(attributes)
