"""Work as an answer, and an answer as a future."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from distnadam.protocol.delivery import Reply
from distnadam.tensors.arrays import memory_for


def attempt(shard: int, work: Callable[[], Any]) -> Any:
    """Return what work on a shard's state returns, or its error."""
    try:
        with memory_for(f"shard {shard}: a copy of its state"):
            return work()
    except Exception as error:
        return error


def resolves(future: Future[Any]) -> Reply:
    """Return what has a future carry the answer, or raise it."""

    def reply(answer: Any) -> None:
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    return reply
