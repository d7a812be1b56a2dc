"""Gradients that leave for shards of other hosts while the backward pass yields the rest."""

from collections.abc import Callable, Mapping

from distnadam.backends.base import WorkerChannel
from distnadam.protocol.messages import PushSlice
from distnadam.tensors.arrays import dtype_of
from distnadam.tensors.layout import Ranges

BUCKET_BYTES = 1 << 20
"""Of one shard's range in one piece, so that a message carries more than it costs."""

_Interval = tuple[int, int]


class PushAhead:
    """What has been sent ahead of one worker's next push.

    Args:
        make: returns a part of that push, given its space and its first and last element.
    """

    def __init__(self, make: Callable[[str, int, int], PushSlice]) -> None:
        self._make = make
        self._written: dict[tuple[int, str], list[_Interval]] = {}
        self._counts: dict[int, int] = {}

    def wrote(
        self, channel: WorkerChannel, ranges: list[Ranges], space: str, begin: int, end: int
    ) -> None:
        """Take elements that have been written; send the pieces that are large enough by now."""
        for shard in channel.relayed:
            low, high = ranges[shard].get(space, (0, 0))
            piece = max(begin, low), min(end, high)
            if piece[0] >= piece[1]:
                continue
            rest = self._written.setdefault((shard, space), [])
            piece = _join(rest, piece)
            if (piece[1] - piece[0]) * dtype_of(space).itemsize < BUCKET_BYTES:
                rest.append(piece)
            elif channel.send_ahead(shard, self._make(space, *piece)):
                self._counts[shard] = self._counts.get(shard, 0) + 1

    def take_counts(self, *, is_pushed: bool) -> Mapping[int, int]:
        """Return how many slices of the push that is sent now each shard has; begin anew.

        Args:
            is_pushed: whether they are of that push.
        """
        if not self._written and not self._counts:
            return {}
        counts = self._counts if is_pushed else {}
        self._counts = {}
        self._written = {}
        return counts


def _join(rest: list[_Interval], piece: _Interval) -> _Interval:
    """Return a piece with those of `rest` that it touches, which are taken out of it."""
    for other in list(rest):
        if other[0] <= piece[1] and piece[0] <= other[1]:
            rest.remove(other)
            piece = min(piece[0], other[0]), max(piece[1], other[1])
    return piece
