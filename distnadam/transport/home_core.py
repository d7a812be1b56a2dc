"""The core that a worker and a shard share where a host has no core to spare.

With a shard and a worker for each core, a step is short where every core has one of each, which
wake each other there: nothing crosses the cores but what one pair lacks of another. Linux does not
place them so by itself: a thread that another wakes tends to be queued on the waker's core, until
all are on one, or each wakes an idle core, which costs more than a small step. So a thread that is
about to wait elsewhere does so on its home core, and may run anywhere again once it has waited:
threads that it starts never inherit the one core. It knows no frame and no message.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter
from types import TracebackType
from typing import TypeVar

_Any = TypeVar("_Any")
_LONG_S = 1e-3
"""Seconds: less than other work keeps a core for, and more than a small step takes."""
_PAYS = 64
"""Waits at home that together save what a long one costs."""
_SHORTEST_ABSENCE, _LONGEST_ABSENCE = 16, 1 << 13
"""In waits."""

_current_core: Callable[[], int] | None = getattr(ctypes.PyDLL(None), "sched_getcpu", None)
"""Without Python's lock being released for so short a call; None in a C library without it."""


def partner_first(others: Sequence[_Any], index: int) -> list[_Any]:
    """Return those that the one of this index waits for, in the order in which it does: its
    partner, which is on its home core, is the first.

    Args:
        others: all of the other side, in the order of their indices.
        index: its own, on its side.
    """
    partner = index % len(others) if others else 0
    return [*others[partner:], *others[:partner]]


class HomeCore:
    """A context in which one thread waits on its home core; it does nothing where there is a core
    without a pair, since the system then places threads well.

    A wait that is long says that other work has the core, or that a step is so long that no core
    matters: the thread then waits anywhere for a while, twice as long at each repetition.

    Args:
        index: the shard's, or the worker's rank: the pair of one index has one core.
        pairs: how many pairs there are on this host: 0 if they are not all here.
    """

    def __init__(self, index: int, pairs: int) -> None:
        self._core: int | None = None
        self._allowed: set[int] | None = None  # while the thread is kept on its core
        self._began = 0.0
        self._absent = 0  # waits that go on anywhere
        self._absence = _SHORTEST_ABSENCE
        self._stayed = 0  # waits at home since the last absence
        cores = sorted(os.sched_getaffinity(0))
        if 1 < len(cores) <= pairs:
            self._core = cores[index % len(cores)]

    def __enter__(self) -> None:
        if self._core is None or _current_core is None:
            return
        if self._absent:
            self._absent -= 1
            return
        self._began = perf_counter()
        if _current_core() != self._core:
            allowed = os.sched_getaffinity(0)
            if self._core in allowed:
                self._allowed = allowed
                self._keep_on({self._core})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._allowed is not None:
            allowed, self._allowed = self._allowed, None
            self._keep_on(allowed)
        if self._began:
            waited_s, self._began = perf_counter() - self._began, 0.0
            self._stayed += 1
            if waited_s > _LONG_S:
                has_paid = self._stayed > _PAYS
                longer = min(2 * self._absence, _LONGEST_ABSENCE)
                self._absent = self._absence = _SHORTEST_ABSENCE if has_paid else longer
                self._stayed = 0

    @staticmethod
    def _keep_on(cores: set[int]) -> None:
        with suppress(OSError):  # the cores of its control group have just changed
            os.sched_setaffinity(0, cores)
