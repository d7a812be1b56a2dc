"""Pause every shard after the same round. Knows messages; not who sends them, nor by what."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distnadam.protocol.messages import CatchUp, Pause, Paused, Resume

Ask = Callable[[Mapping[int, Any]], dict[int, Any]]
"""Sends messages by shard index; returns every answer, or raises the first error."""


def _never(newest: Paused) -> bool:
    return False


@contextmanager
def all_paused(
    ask: Ask,
    resume: Callable[[Mapping[int, Resume]], object],
    token: str,
    num_shards: int,
    *,
    may_lag: Callable[[Paused], bool] = _never,
) -> Iterator[dict[int, Paused]]:
    """Pause all shards between two rounds, and have them resume at the end, whatever happens.

    Shard 0 comes first, so that of two callers one gets all shards. Shards that stopped a round
    earlier than others then complete the round that the others have decided.

    Args:
        ask: sends messages and returns all answers; what it raises ends the pause.
        resume: sends `Resume` to every shard; must not raise because of a dead shard.
        token: the caller's, unique among those who pause.
        num_shards: how many shards there are.
        may_lag: from the newest answer, whether late shards stay where they stopped.

    Yields:
        Each shard's answer by index; a late one's says where it was before it caught up.
    """
    try:
        held: dict[int, Paused] = ask({0: Pause(token)})
        if num_shards > 1:
            held |= ask({index: Pause(token) for index in range(1, num_shards)})
        newest = max(held.values(), key=lambda answer: answer.round)
        late = lagging(held)
        if late and not may_lag(newest):
            ask({index: CatchUp(token, newest.round) for index in late})
        yield held
    finally:
        resume({index: Resume(token) for index in range(num_shards)})


def lagging(held: Mapping[int, Paused]) -> list[int]:
    """Return the shards that stopped before the newest round."""
    newest = max(answer.round for answer in held.values())
    return [index for index, answer in held.items() if answer.round < newest]
