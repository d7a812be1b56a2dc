"""The dtypes the package knows: what a tensor may be, and the dtype its master copy and slots are
kept in; and the storage of those.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from distnadam.errors import OutOfMemory

Array = NDArray[Any]
Flat = dict[str, Array]
"""One 1-D array per element space, keyed by the space's dtype name."""
Copies = tuple[Mapping[str, Flat], Mapping[str, Flat]]
"""Two copies of arrays, each by name."""
Dtypes = Mapping[str, np.dtype[Any]]
"""By element space, the dtype in which its elements are kept somewhere."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SPACE_OF = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""The element space (the dtype of the master copy and of m and v) of each dtype a parameter may
have.
"""
SPACES = ("float32", "float64")
STATE_ARRAYS = ("params", "m", "v")
"""The arrays of every optimizer's state, each one flat array per space: parameters, both moments.
`NadamConfig.state_arrays` says which one has.
"""
HALF = frozenset({"float16", "bfloat16"})
"""Half precisions, in which gradients may come for the float32 space."""

NAME_OF = {np.dtype(name): name for name in SPACE_OF if name != "bfloat16"} | {BFLOAT16: "bfloat16"}
"""The name of each dtype that a gradient may have; `dtype.name` takes microseconds to put it
together.
"""

own_errors = partial(np.errstate, all="ignore")
"""The handling of NumPy's floating-point errors in all arithmetic of the package, whatever its
user's: underflow is harmless, and what is not finite is found and named. A context manager, and a
decorator.
"""


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of that name, bfloat16 included."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def dtypes_of(spaces: Iterable[str], float32: str | None = None) -> dict[str, np.dtype[Any]]:
    """Return each space's own dtype, with the named one for the float32 space unless it is None."""
    return {s: dtype_of(float32 if float32 and s == "float32" else s) for s in spaces}


def empty_flat(sizes: Mapping[str, int], dtypes: Dtypes | None = None) -> Flat:
    """Return uninitialised storage of `sizes[space]` elements per space, in other dtypes if
    given.
    """
    dtypes = dtypes_of(sizes) if dtypes is None else dtypes
    return {space: np.empty(n, dtypes[space]) for space, n in sizes.items()}


def zeros_flat(sizes: Mapping[str, int], dtypes: Dtypes | None = None) -> Flat:
    """Return zeroed storage of `sizes[space]` elements per space, in other dtypes if given."""
    dtypes = dtypes_of(sizes) if dtypes is None else dtypes
    return {space: np.zeros(n, dtypes[space]) for space, n in sizes.items()}


@own_errors()
def round_into(rounded: Array, values: Array) -> None:
    """Write values rounded to nearest, ties to even, in the dtype of `rounded`; what is beyond its
    largest number becomes infinite, and NaN stays NaN.
    """
    np.copyto(rounded, values, casting="unsafe")


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say what there was no memory for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't start new thread" not in str(
            error
        ):  # a thread's stack is memory too
            raise
        raise OutOfMemory(
            f"{what}: {str(error) or 'no memory'}; use more shards, or processes that may have more"
        ) from error


def cut_flat(flat: Flat, ranges: dict[str, tuple[int, int]]) -> Flat:
    """Return views of one half-open range per space."""
    return {space: flat[space][begin:end] for space, (begin, end) in ranges.items()}
