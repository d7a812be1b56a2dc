"""The parameters of one shard of another host, as they come into this host's memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distnadam.errors import LaneError, Reconfigured
from distnadam.protocol.messages import RoundResult
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.transport.tcp_connection import Parts, parts_of

_Key = tuple[int, int, int]
"""Epoch, round and buffer: what a shard's parameters are known by."""


class LandedParameters:
    """Which parameters of a shard lie whole in the host's memory, and which come now.

    Used in one thread.

    Args:
        index: the shard's.
        buffers: its ranges of the host's two parameter buffers.
        sizes: elements, by space.
        dtypes: what parameters travel in, by space.
    """

    def __init__(
        self,
        index: int,
        buffers: Sequence[Flat],
        sizes: Mapping[str, int],
        dtypes: Mapping[str, np.dtype[Any]],
    ) -> None:
        self._index = index
        self._buffers = buffers
        self._sizes = sizes
        self._dtypes = dtypes
        self._whole: _Key | None = None
        self._coming: _Key | None = None
        self._newest: _Key = (0, 0, 0)

    def begin(self, answer: RoundResult, num_bytes: int) -> Parts:
        """Return where the bytes behind an answer belong; none of an older round's are kept.

        Raises:
            LaneError: it has no bytes, and its parameters are not here.
        """
        key = _key(answer)
        is_old = key[:2] < self._newest[:2]
        parts: Parts = ()
        if num_bytes:
            parts = parts_of(
                empty_flat(self._sizes, self._dtypes) if is_old else self._buffers[answer.buffer]
            )
        elif key != self._whole and not is_old and any(self._sizes.values()):
            raise LaneError(f"the parameters of round {answer.round} did not come")
        if not is_old and key != self._whole:
            self._newest = self._coming = key
            self._whole = None
        return parts

    def end(self, answer: RoundResult) -> None:
        """Take it that all bytes of an answer have come."""
        if self._coming is not None and self._coming == self._newest == _key(answer):
            self._whole = self._coming
        self._coming = None

    def interrupt(self) -> None:
        """Take it that the rest of what comes now does not."""
        self._coming = None

    def clear(self) -> None:
        """Release the memory; nothing comes any more."""
        self._buffers = ()

    def is_overtaken_by(self, answer: RoundResult) -> bool:
        """Whether `put` would write an answer's parameters while others come."""
        return self._is_news(_key(answer)) and self._coming not in (None, _key(answer))

    def put(self, answer: RoundResult) -> None:
        """Copy the parameters of an answer to where they belong, unless newer ones have come.

        Raises:
            LaneError: it has none.
        """
        key = _key(answer)
        if not self._is_news(key):
            return
        if answer.parameters is None:
            raise LaneError(f"shard {self._index} sent round {answer.round} without parameters")
        self._newest = key
        self._whole = None
        for space, values in self._buffers[answer.buffer].items():
            np.copyto(values, answer.parameters[space])
        self._whole = key

    def readable(self, answer: RoundResult) -> RoundResult | Reconfigured:
        """Return an answer whose parameters are here, else have the worker ask again."""
        if _key(answer) == self._whole:
            return replace(answer, parameters=None)
        return Reconfigured(
            f"shard {self._index}: newer parameters than those of round {answer.round} have come "
            "to this host; look again",
            answer.epoch,
            answer.round,
        )

    def _is_news(self, key: _Key) -> bool:
        return key[:2] >= self._newest[:2] and key != self._whole


def _key(answer: RoundResult) -> _Key:
    if answer.buffer not in (0, 1):
        raise LaneError(f"there is no buffer {answer.buffer}")
    return answer.epoch, answer.round, answer.buffer
