"""Memory for arrays that come from other hosts, lent again and again: new memory costs more time
than what is received into it.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from distnadam.tensors.arrays import Array, Flat


def _references(kept: list[Array], index: int) -> int:
    """Return how many references to an array of the list there are, some of the call's own."""
    return sys.getrefcount(kept[index])


_REFERENCES_OF_FREE = _references([np.empty(0)], 0)
"""To an array that nobody was lent, as this interpreter counts them: versions differ."""


class LandingMemory:
    """Lends flat arrays, each from memory that nothing refers to any more.

    Args:
        most: the number of arrays of one space that are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[str, list[Array]] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes of all that is kept."""
        return sum(memory.nbytes for kept in self._kept.values() for memory in kept)

    def clear(self) -> None:
        """Release what is kept."""
        self._kept.clear()

    def lend(self, sizes: Mapping[str, int], dtypes: Mapping[str, np.dtype[Any]]) -> Flat:
        """Return one array per space, of any content.

        Args:
            sizes: elements per space.
            dtypes: by space; at most as wide as those of the space's first array.
        """
        return {
            space: self._find(space, size * dtypes[space].itemsize).view(dtypes[space])
            for space, size in sizes.items()
        }

    def _find(self, space: str, num_bytes: int) -> Array:
        kept = self._kept.setdefault(space, [])
        for index in range(len(kept)):
            if kept[index].nbytes >= num_bytes and _references(kept, index) == _REFERENCES_OF_FREE:
                return kept[index][:num_bytes]
        memory = np.empty(num_bytes, np.uint8)
        kept.append(memory)
        del kept[: -self._most]
        return memory[:]
