"""Which pushes counted: for every rank, runs of consecutive rounds by one incarnation. Exact for
ever, small always. Pure.

Each direct step is an incarnation of its own, and so is each handle's first one, at random: a
run of one handle's steps rises with its rounds.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

DIRECT = -1
"""The rank under which a direct step (`apply_gradients`) is entered."""


class Ledger:
    """The rounds in which each (rank, incarnation) was counted.

    Attributes:
        newest: the newest incarnation of each rank, 0 where there was none; of direct steps the
            highest.
    """

    def __init__(self) -> None:
        self._runs: dict[int, list[list[int]]] = {}
        self.newest: Counter[int] = Counter()

    def admit(self, rank: int, incarnation: int | None) -> int:
        """Make `incarnation` the rank's newest where it is newer (None: the one after the newest)
        and return it.
        """
        admitted = self.newest[rank] + 1 if incarnation is None else incarnation
        self.newest[rank] = max(self.newest[rank], admitted)
        return admitted

    def admit_all(self, newest: Mapping[int, int]) -> None:
        """Take over what others know of each rank's newest incarnation."""
        for rank, incarnation in newest.items():
            self.admit(rank, incarnation)

    def newest_of_all(self) -> dict[int, int]:
        """Return the newest incarnation of each rank that had one."""
        return dict(self.newest)

    def count(self, rank: int, incarnation: int, decided: int, rounds: int = 1) -> None:
        """Enter that a rank's push was counted in the round `decided`, which is later than any
        before; or a worker's pushes, or one handle's steps, in so many rounds, of which that is the
        last.
        """
        runs = self._runs.setdefault(rank, [])
        first, began, last = runs[-1] if runs else (0, 0, 0)
        following = first + decided - began if rank == DIRECT else first
        if runs and last == decided - rounds and following == incarnation:
            runs[-1][2] = decided
        else:
            before = rounds - 1 if rank == DIRECT else 0
            runs.append([incarnation - before, decided - rounds + 1, decided])

    def counted(self, rank: int, incarnation: int, decided: int) -> bool:
        """Whether the push of (rank, incarnation) for that round was counted."""
        return any(
            first <= decided <= last
            and incarnation == (i + decided - first if rank == DIRECT else i)
            for i, first, last in reversed(self._runs.get(rank, []))
        )

    def last(self, rank: int) -> int:
        """Return the last round in which a push of this rank was counted, 0 where none was."""
        runs = self._runs.get(rank)
        return runs[-1][2] if runs else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` takes."""
        return {
            "runs": [[rank, *run] for rank, runs in sorted(self._runs.items()) for run in runs],
            "newest": [[rank, incarnation] for rank, incarnation in sorted(self.newest.items())],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Ledger":
        """Return the ledger that `to_dict` described."""
        ledger = cls()
        numbers = [number for row in (*data["runs"], *data["newest"]) for number in row]
        if not all(type(number) is int for number in numbers):
            raise ValueError("expected whole numbers only")
        for rank, incarnation, first, last in data["runs"]:
            ledger._runs.setdefault(rank, []).append([incarnation, first, last])
        ledger.newest = Counter(dict(data["newest"]))
        return ledger
