"""A tree of gradients that are NumPy's own arrays, whole and of the model's dtypes, as nearly every
one is: looked at and copied by one compiled call for each run of small tensors.
"""

from collections.abc import Callable
from typing import Any

from distnadam.client.gradient_runs import LENT, Run, runs_of
from distnadam.nadam.gather import gather
from distnadam.nadam.gather_abi import COPIED, LARGE, OTHER
from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout

_Copies = list[tuple[Run, Array, Callable[[list[Any]], int]]]
"""Runs with their memory, and what copies leaves into it."""
_NONE: list[tuple[Run, Array]] = []


class PlainGradients:
    """Copies such trees into flat memory.

    Args:
        layout: the model's.
        memory: one flat array per space, of its dtype.
    """

    def __init__(self, layout: Layout, memory: Flat) -> None:
        self._pick = layout.plain_spec.pick
        self._copies: _Copies = []  # from the leaves of a tree
        self._looks: _Copies = []  # from the memory itself, as one leaf
        self._is_able = False
        runs = runs_of(layout)
        # a call holds the interpreter's lock; and all leaves are to be looked at
        if layout.frozen or any(run.end - run.begin > LENT for run in runs):
            return
        for run in runs:
            values = memory[run.space][run.begin : run.end]
            shapes = [tensor.shape for tensor in layout.tensors[run.first : run.last]]
            copy, look = gather(run.first, shapes, values), gather(0, [values.shape], values)
            if copy is None or look is None:
                return
            self._copies.append((run, values, copy))
            self._looks.append((run, values, look))
        self._is_able = True

    def copy(self, tree: Any) -> list[tuple[Run, Array]] | None:
        """Copy a tree; return the runs that are to be searched for what is not finite, nearly
        always none. None if the tree is another, of which any may have been copied.
        """
        if not self._is_able or (leaves := self._pick(tree)) is None:
            return None
        if type(leaves) is not list:
            leaves = [*leaves]
        doubtful = _NONE
        for run, values, copy in self._copies:
            result = copy(leaves)
            if result == OTHER:
                return None
            if result == LARGE:
                doubtful = [*doubtful, (run, values)]
        return doubtful

    def look(self) -> list[tuple[Run, Array]] | None:
        """Return the runs of the memory, as it is, that are to be searched; None if all are."""
        if not self._is_able:
            return None
        return [(run, values) for run, values, look in self._looks if look([values]) != COPIED]
