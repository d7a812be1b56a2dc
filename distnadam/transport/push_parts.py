"""The gradients of one push that travel ahead of it, at both ends of a connection: a relay knows
which it has sent, a shard which have come, and the push brings the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

from distnadam.errors import LaneError
from distnadam.protocol.messages import Push, PushSlice
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges

_Parts = list[memoryview]
_Interval = tuple[int, int]


class _Turn(NamedTuple):
    """What a slice and its push have in common."""

    epoch: int
    incarnation: int
    round: int


class PushParts:
    """By rank, the slices of the next push to one shard over one connection.

    Args:
        ranges: what the shard holds.
    """

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._ahead: dict[int, _Ahead] = {}

    def add(self, part: PushSlice, memory: Callable[[], Flat]) -> _Parts:
        """Return the memory of a slice, which now counts as there.

        Args:
            part: a slice; with the first of a push, what came of another is forgotten.
            memory: returns the memory of the whole push, in the spaces' dtypes.

        Raises:
            LaneError: the shard does not hold these elements, or some are there already.
        """
        low, high = self._ranges.get(part.space, (0, 0))
        if not low <= part.begin < part.end <= high:
            raise LaneError(
                f"a slice of {part.space} from {part.begin} to {part.end}, expected one within "
                f"{low} to {high}"
            )
        turn = _turn(part)
        ahead = self._ahead.get(part.rank)
        if ahead is None or ahead.turn != turn:
            ahead = self._ahead[part.rank] = _Ahead(turn, memory())
        return ahead.add(part.space, part.begin - low, part.end - low)

    def rest(self, push: Push) -> tuple[Flat, _Parts] | None:
        """Return a push's whole memory, and that of the gradients which no slice had.

        None if its slices are not those that are there. They are forgotten then as well.
        """
        ahead = self._ahead.pop(push.rank, None)
        is_whole = ahead is None or ahead.turn != _turn(push) or ahead.count != push.slices
        return None if ahead is None or is_whole else (ahead.memory, ahead.missing())

    def forget(self, rank: int) -> None:
        """Forget a rank's slices: its worker is gone."""
        self._ahead.pop(rank, None)


class _Ahead:
    """The slices of one push."""

    def __init__(self, turn: _Turn, memory: Flat) -> None:
        self.turn = turn
        self.memory = memory
        self.count = 0
        self._there: dict[str, list[_Interval]] = {space: [] for space in memory}

    def add(self, space: str, begin: int, end: int) -> _Parts:
        there = self._there[space]
        if any(begin < other_end and other < end for other, other_end in there):
            raise LaneError(f"a slice of {space} from {begin} to {end} came again")
        there.append((begin, end))
        self.count += 1
        return [self.memory[space][begin:end].view("u1").data]

    def missing(self) -> _Parts:
        return [
            self.memory[space][begin:end].view("u1").data
            for space in sorted(self.memory)
            for begin, end in _gaps(self._there[space], self.memory[space].size)
        ]


def _turn(of: Push | PushSlice) -> _Turn:
    return _Turn(of.epoch, of.incarnation, of.round)


def _gaps(intervals: list[_Interval], size: int) -> list[_Interval]:
    """Return what intervals that do not overlap leave of [0, size), in order."""
    gaps, reached = [], 0
    for begin, end in sorted(intervals):
        if reached < begin:
            gaps.append((reached, begin))
        reached = end
    return [*gaps, (reached, size)] if reached < size else gaps
