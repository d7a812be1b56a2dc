"""A tree of gradients that are NumPy's own arrays, whole and of the model's dtypes, as nearly every
one is: found, looked at and copied by one compiled call for many runs of small tensors.
"""

from collections.abc import Sequence
from typing import Any

from distnadam.client.gradient_runs import LENT, Run, runs_of
from distnadam.nadam.gather import Gather, Leaves, can_gather
from distnadam.nadam.gather_abi import CONTAINERS, LARGE, STRANGE
from distnadam.nadam.tree_table import TreeTable
from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout

_MOST, _MOST_EACH = 4 * LENT, 64
"""Elements that one call copies, since it holds the interpreter's lock; or, as each walks the whole
tree, so many of each leaf.
"""
_Runs = Sequence[tuple[Run, Array]]
"""Runs with their memory."""
_NONE: _Runs = ()


class PlainGradients:
    """Copies such trees into flat memory.

    Args:
        layout: the model's.
        memory: one flat array per space, of its dtype.
    """

    def __init__(self, layout: Layout, memory: Flat) -> None:
        self._copies: list[tuple[_Runs, Gather]] = []  # from a tree
        self._looks: list[tuple[_Runs, Gather, Any]] = []  # from the memory, as if it were a tree
        self._patience = self._strange = 0
        runs, number = runs_of(layout), len(layout.tensors)
        # a call holds the interpreter's lock; and all leaves are to be looked at
        self._is_able = not (layout.frozen or any(run.end - run.begin > LENT for run in runs))
        self._is_able = self._is_able and all(map(can_gather, memory))
        if not self._is_able:
            return
        self._table = TreeTable(layout.skeleton, number)
        shapes = [tensor.shape for tensor in layout.tensors]
        most = max(_MOST, _MOST_EACH * number)
        groups: dict[tuple[str, int], list[tuple[Run, Array]]] = {}
        for run in runs:
            values = memory[run.space][run.begin : run.end]
            groups.setdefault((run.space, run.begin // most), []).append((run, values))
        for group in groups.values():
            leaves = [Leaves(run.first, shapes[run.first : run.last], v) for run, v in group]
            self._copies.append((group, Gather(self._table, leaves)))
            whole = [values for _, values in group]
            leaves = [Leaves(k, [values.shape], values) for k, values in enumerate(whole)]
            as_tree = TreeTable([*range(len(whole))], len(whole))
            self._looks.append((group, Gather(as_tree, leaves), whole))

    def copy(self, tree: Any) -> _Runs | None:
        """Copy a tree; return the runs that are to be searched for what is not finite, nearly
        always none. None if the tree is another, of which any may have been copied.
        """
        if not self._is_able:
            return None
        doubtful, strange = _NONE, 0
        for runs, gather in self._copies:
            result = gather.copy(tree)
            if result == CONTAINERS and self._table.learn(tree):
                result = gather.copy(tree)
            if result < 0:
                return None
            if result:
                strange |= result & STRANGE
                if result & LARGE:
                    doubtful = [*doubtful, *(runs[k] for k in gather.large)]
        if strange:
            self._meet_strangers(tree)
        return doubtful

    def look(self) -> _Runs | None:
        """Return the runs of the memory, as it is, that are to be searched; None if all are."""
        if not self._is_able:
            return None
        doubtful = _NONE
        for runs, gather, whole in self._looks:
            if gather.copy(whole) & LARGE:
                doubtful = [*doubtful, *(runs[k] for k in gather.large)]
        return doubtful

    def _meet_strangers(self, tree: Any) -> None:
        """Learn a tree's keys, which take longer to compare than those known: the more seldom, the
        more often that was for nothing.
        """
        self._strange += 1
        if self._strange > self._patience:
            self._strange, self._patience = 0, 2 * self._patience + 1
            self._table.learn(tree)
