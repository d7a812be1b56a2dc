"""Shards' answers that are not as usual: what comes late, and what differs between shards."""

import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from distnadam import waiting
from distnadam.backends.base import Pending
from distnadam.errors import ShardsDisagree
from distnadam.protocol.messages import RoundResult

common_of = attrgetter("round", "outcome", "lr", "buffer", "revision")
"""Returns what of a `RoundResult` must be the same on all shards."""


def late_answers(
    pending: Pending, timeout_s: float, who: str, whom: Callable[[], str]
) -> dict[int, Any]:
    """Return answers that did not come in `waiting.REPORT_WAIT_S`; log who waits for whom.

    Args:
        pending: the answers on their way.
        timeout_s: how long the whole wait may take.
        who: waits, and for what.
        whom: returns for whom; may ask the shards.

    Raises:
        TimeoutError: not all came in time; may be called again.
        DistNadamError: as `Pending.result`.
    """
    left_s = timeout_s - waiting.REPORT_WAIT_S
    if left_s <= 0:
        raise TimeoutError
    deadline = time.monotonic() + left_s
    waiting.say_waiting(who, whom(), timeout_s)
    return pending.result(max(0.0, deadline - time.monotonic()))


def shards_disagree(first: RoundResult, index: int, other: RoundResult) -> ShardsDisagree:
    """Return the error for a shard that stands elsewhere than shard 0, at the same time."""
    if first.revision != other.revision:
        return ShardsDisagree(
            f"shard 0 {first.outcome} round {first.round} with configuration {first.revision}, "
            f"shard {index} {other.outcome} round {other.round} with configuration "
            f"{other.revision}: a change reached some shards only; go back to a checkpoint"
        )
    return ShardsDisagree(
        f"shard 0 {first.outcome} round {first.round} with lr={first.lr!r}, shard {index} "
        f"{other.outcome} round {other.round} with lr={other.lr!r}; a learning-rate function must "
        "give every shard the same rate for the same step"
    )
