"""Threads that the system may refuse, and objects that a forked child inherits without theirs.

A thread cannot be started where there is no memory for its stack, or once the interpreter ends; a
fork copies memory and locks, but no thread other than its own.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar
from weakref import WeakSet

from distnadam.shield import shield

_T = TypeVar("_T")


def start(thread: threading.Thread) -> None:
    """Start a thread whole: what a signal handler raises in the middle would leave it on Python's
    list of those that are about to start, from which the thread itself then fails to remove it.

    Raises:
        RuntimeError: the system refuses the thread.
    """
    with shield:
        thread.start()


def in_background(name: str, work: Callable[[], _T]) -> "Future[_T]":
    """Run `work` in a thread of its own, for which the process waits at its end; in this thread if
    no other can be started.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    try:
        start(threading.Thread(target=run, name=name))
    except RuntimeError:  # "can't start new thread", or "... at interpreter shutdown"
        run()
    return future


class Forked(Protocol):
    """What a forked child must put in order before it is used there."""

    def after_fork(self) -> None:
        """Replace what only the parent's threads could have finished."""


_inherited: "WeakSet[Forked]" = WeakSet()


def renew_after_fork(inherited: Forked) -> None:
    """Have `inherited.after_fork()` called in every child that this process forks."""
    _inherited.add(inherited)


def _renew() -> None:
    for inherited in list(_inherited):
        inherited.after_fork()


os.register_at_fork(after_in_child=_renew)
