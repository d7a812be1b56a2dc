"""The wait for shards' answers: whoever waits long says for whom, once."""

import time
from collections.abc import Callable
from typing import Any

from distnadam import waiting
from distnadam.backends.base import Pending


def answers_of(
    pending: Pending, timeout_s: float, who: str, whom: Callable[[], str]
) -> dict[int, Any]:
    """Return the answers by shard; after `waiting.REPORT_WAIT_S` log who waits for whom.

    Args:
        pending: the answers on their way.
        timeout_s: how long to wait.
        who: waits, and for what.
        whom: returns for whom; may ask the shards.

    Raises:
        TimeoutError: not all came in time; may be called again.
        DistNadamError: as `Pending.result`.
    """
    deadline = time.monotonic() + timeout_s
    if timeout_s > waiting.REPORT_WAIT_S:
        try:
            return pending.result(waiting.REPORT_WAIT_S)
        except TimeoutError:
            waiting.say_waiting(who, whom(), timeout_s)
    return pending.result(max(0.0, deadline - time.monotonic()))
