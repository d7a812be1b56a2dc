"""Gradients that leave for shards of other hosts while the backward pass yields the rest."""

from collections.abc import Mapping
from typing import Any, Protocol

from distnadam.backends.base import WorkerChannel
from distnadam.protocol.messages import PushSlice
from distnadam.tensors.arrays import dtype_of
from distnadam.tensors.layout import Ranges, TensorSpec

BUCKET_BYTES = 1 << 20
"""Of one shard's range in one piece, so that a message carries more than it costs."""

_Interval = tuple[int, int]


class Pushing(Protocol):
    """The worker's session: `round` is the last decided, `ranges` what each shard holds."""

    rank: int
    epoch: int
    round: int
    in_sync: bool
    ranges: list[Ranges]

    @property
    def incarnation(self) -> int:
        """The worker's."""

    @property
    def channel(self) -> WorkerChannel:
        """Leads to the shards."""


class PushAhead:
    """What has been sent ahead of one worker's next push.

    Args:
        session: the worker's.

    Attributes:
        written: what was written and is not sent yet, by shard and space; not empty from the first
            tensor on, until `take_counts`.
    """

    def __init__(self, session: Pushing) -> None:
        self.written: dict[tuple[int, str], list[_Interval]] = {}
        self._session = session
        self._counts: dict[int, int] = {}
        self._push: tuple[Any, ...] = ()

    def wrote(self, tensor: TensorSpec) -> None:
        """Take a tensor that has been written; send the pieces that are large enough by now."""
        session, space = self._session, tensor.space
        push = (id(session.ranges), session.epoch, session.round, session.incarnation)
        if push != self._push:  # what was written before is of none, or of another cut
            self.forget()
            self._push = push
        for shard in session.channel.relayed if session.in_sync else ():
            low, high = session.ranges[shard].get(space, (0, 0))
            piece = max(tensor.begin, low), min(tensor.end, high)
            if piece[0] >= piece[1]:
                continue
            rest = self.written.setdefault((shard, space), [])
            piece = _join(rest, piece)
            if (piece[1] - piece[0]) * dtype_of(space).itemsize < BUCKET_BYTES:
                rest.append(piece)
            elif session.channel.send_ahead(shard, self._slice(space, *piece)):
                self._counts[shard] = self._counts.get(shard, 0) + 1

    def take_counts(self, *, is_pushed: bool) -> Mapping[int, int]:
        """Return how many slices of the push that is sent now each shard has; begin anew.

        Args:
            is_pushed: whether they are of that push.
        """
        counts = self._counts if is_pushed else {}
        self.forget()
        return counts

    def forget(self) -> None:
        """Have nothing that was sent count: the push brings it again."""
        self._counts = {}
        self.written = {}

    def _slice(self, space: str, begin: int, end: int) -> PushSlice:
        session = self._session
        return PushSlice(
            epoch=session.epoch,
            rank=session.rank,
            incarnation=session.incarnation,
            round=session.round + 1,
            space=space,
            begin=begin,
            end=end,
        )


def _join(rest: list[_Interval], piece: _Interval) -> _Interval:
    """Return a piece with those of `rest` that it touches, which are taken out of it."""
    for other in list(rest):
        if other[0] <= piece[1] and piece[0] <= other[1]:
            rest.remove(other)
            piece = min(piece[0], other[0]), max(piece[1], other[1])
    return piece
