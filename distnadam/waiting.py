"""What is said, once, of a wait that lasts long: who waits, for whom, and how it goes on."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any

from distnadam.threads import start

log = logging.getLogger("distnadam")

REPORT_WAIT_S = 10.0
"""Seconds after which whoever waits says for whom."""


def say_waiting(who: str, whom: str, up_to_s: float | None = None) -> None:
    """Log that somebody has waited for `REPORT_WAIT_S`.

    Args:
        who: waits, and in which step or for what.
        whom: is waited for, as a clause such as "for shard 1, which does not answer".
        up_to_s: seconds after which the wait is given up, if it is.
    """
    until = "" if up_to_s is None else f", up to {up_to_s:g} s"
    log.warning("%s: has waited %g s, %s; it waits on%s", who, REPORT_WAIT_S, whom, until)


def is_long(future: "Future[Any]", timeout_s: float | None) -> bool:
    """Wait for a future, and return whether it lasts longer than `REPORT_WAIT_S`.

    Args:
        future: is awaited.
        timeout_s: how long the caller waits; None for as long as it takes.
    """
    if timeout_s is not None and timeout_s <= REPORT_WAIT_S:
        return False
    return not wait([future], REPORT_WAIT_S).done


@contextmanager
def said_if_long(who: str, whom: Callable[[], str], up_to_s: float | None = None) -> Iterator[None]:
    """Call `say_waiting` if the body takes longer than `REPORT_WAIT_S`.

    It starts a thread, so it is for work that is done now and then, not in each step. Where the
    system has no thread left, nothing is said.

    Args:
        who, up_to_s: as `say_waiting` takes them.
        whom: returns what that takes; called in the other thread, and may ask the shards.
    """
    over = threading.Event()

    def watch() -> None:
        if not over.wait(REPORT_WAIT_S):
            try:
                for_whom = whom()
            except Exception as error:  # the work itself raises what is wrong
                for_whom = f"(for whom cannot be told: {error})"
            if not over.is_set():
                say_waiting(who, for_whom, up_to_s)

    try:
        with suppress(RuntimeError):  # "can't start new thread"
            start(threading.Thread(target=watch, name="waiting", daemon=True))
        yield
    finally:
        over.set()
