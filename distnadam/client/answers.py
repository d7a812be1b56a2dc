"""The rest of a long wait for shards' answers: whoever waits long says for whom, once."""

import time
from collections.abc import Callable
from typing import Any

from distnadam import waiting
from distnadam.backends.base import Pending


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
