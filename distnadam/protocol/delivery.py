"""How a message is handed to a shard in its own process: with a callback for the answer, and with
whatever runs the heavy work that it causes.
"""

import operator
from collections.abc import Callable
from typing import Any

from distnadam.errors import DistNadamError, ShardLost
from distnadam.protocol.messages import Message
from distnadam.protocol.supervisor_messages import Order

Reply = Callable[[Any], None]
"""Called once with the answer; an exception is raised where the message came from."""

RunWork = Callable[[Callable[[], None]], object]
"""Runs one piece of heavy work: in the calling thread, or in an executor's."""

Deliver = Callable[[Message | Order, Reply, RunWork], None]
"""Gives a shard one message; `Reply` is called now or later, in any thread."""

run_in_this_thread: RunWork = operator.call
"""Runs work in the calling thread."""


def portable(answer: Any) -> Any:
    """Return an answer as another process can read it: an error that is not ours as `ShardLost`."""
    if isinstance(answer, Exception) and not isinstance(answer, DistNadamError):
        return ShardLost(f"{type(answer).__name__}: {answer}")
    return answer
