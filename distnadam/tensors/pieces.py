"""Several arrays read as if they lay one after the other in one, where each of them lies."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import cast

import numpy as np

from distnadam.tensors.arrays import Array

_dtype_of = attrgetter("dtype")
_MANY = 64
"""Arrays from which on it is worth asking whether all are alike."""


class Pieces:
    """1-D arrays of one dtype as one, which can be sliced; never written.

    Attributes:
        dtype: of the elements.
        size: how many there are.
        bounds: where each array begins, and `size`.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = arrays
        self.dtype = arrays[0].dtype
        self.bounds = [0, *accumulate(array.size for array in arrays)]
        self.size = self.bounds[-1]

    def __getitem__(self, elements: slice) -> Array:
        """Return [start, stop): a view where they lie in one array, else a copy."""
        found = self._between(elements.start, elements.stop)
        return found[0] if len(found) == 1 else np.concatenate([self._arrays[0][:0], *found])

    def cut(self, begin: int, end: int) -> "Array | Pieces":
        """Return elements [begin, end), where they lie."""
        found = self._between(begin, end)
        return Pieces(found) if len(found) > 1 else self[begin:end]

    def _between(self, begin: int, end: int) -> list[Array]:
        found = []
        index = max(0, bisect_right(self.bounds, begin) - 1)
        while index < len(self._arrays) and (low := self.bounds[index]) < end:
            part = self._arrays[index][max(begin, low) - low : end - low]
            if part.size:
                found.append(part)
            index += 1
        return found


def stretches(begin: int, end: int, most: int, bounds: Iterable[int]) -> list[tuple[int, int]]:
    """Cut [begin, end) at the bounds, and into stretches of `most` elements at most."""
    inner = sorted({bound for bound in bounds if begin < bound < end})
    return [
        (low, min(low + most, high))
        for start, high in pairwise([begin, *inner, end])
        for low in range(start, high, max(1, most))
    ]


def concatenate(arrays: Sequence[Array], out: Array) -> None:
    """Write the elements of arrays, of floating-point dtypes that may not be cast to its own where
    they have none, one after the other into a 1-D one.

    Many small ones of its own dtype go as bytes, which takes a third of the time.
    """
    if len(arrays) >= _MANY and set(map(_dtype_of, arrays)) == {out.dtype}:
        try:
            joined = b"".join(cast("Iterable[bytes]", arrays))  # of their buffers
        except TypeError:  # one is not contiguous
            pass
        else:
            out[:] = np.frombuffer(joined, out.dtype)
            return
    np.concatenate(arrays, axis=None, out=out, casting="unsafe")
