"""Work that no exception of a signal handler cuts in the middle.

Python runs signal handlers in the main thread, between any two of its instructions, and what they
raise (KeyboardInterrupt, the error of a time limit) ends whatever runs there. So while work of the
main thread must be whole, handlers are put off: they run when it has ended, or where it would wait
for somebody itself.
"""

import _signal  # type: ignore[import-not-found]  # what `signal` wraps
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, TypeVar

_T = TypeVar("_T")
_Handler = Callable[[int, FrameType | None], Any]
_LOOK_S = 0.001
"""Seconds between two looks whether a lock is free."""
_WAKE = object()
"""What ends a wait of shielded work, so that it looks for a signal."""
_SIGNALS = tuple(sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))
# without the module's conversions to enumerations, which take ten times as long as a shield's rest
_handler_of: Callable[[int], Any] = _signal.getsignal
_set_handler: Callable[[int, Any], Any] = _signal.signal


class _StandIn(partial[None]):
    """`Shield.take` of a signal's handler, which stands for it while shielded work runs."""


class Shield:
    """A context manager in which no signal handler runs in the main thread.

    They run once the work has ended, or where it waits by `get_or_interrupt`, and what they raise
    is raised then. In any other thread, and inside itself, it does nothing.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Be without work, as in a forked child."""
        self._main = threading.main_thread().ident
        self._depth = 0
        self._handlers: list[tuple[int, _Handler]] = []
        # of all signals when work last began, and what stood for them then
        self._seen: list[Any] = []
        self._stand_ins: list[tuple[int, _Handler, _StandIn]] = []
        self._put_off: list[tuple[_Handler, int, FrameType | None]] = []
        self._waits_at: SimpleQueue[Any] | None = None

    def __enter__(self) -> None:
        if threading.get_ident() != self._main:
            return
        try:
            self._depth += 1
            if self._depth == 1:
                now = list(map(_handler_of, _SIGNALS))
                if now != self._seen:
                    self._look_at(now)
                for number, handler, stand_in in self._stand_ins:
                    self._handlers.append((number, handler))
                    _set_handler(number, stand_in)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        if threading.get_ident() != self._main:
            return
        if self._depth > 1:
            self._depth -= 1
            return
        self._depth = 0  # the first of all: from here on each handler may raise
        handlers = self._handlers
        self._handlers = []
        try:
            for number, handler in handlers:
                _set_handler(number, handler)
        finally:
            if self._put_off:
                self.deliver()

    def _look_at(self, handlers: list[Any]) -> None:
        """Make what stands for these handlers of all signals."""
        self._seen = []
        self._stand_ins = []
        for number, handler in zip(_SIGNALS, handlers, strict=True):
            if callable(handler):
                if isinstance(handler, _StandIn):  # left by an interrupt in `__exit__`
                    handler = handler.args[0]
                self._stand_ins.append((number, handler, _StandIn(self.take, handler)))
        self._seen = handlers

    @property
    def covers_this_thread(self) -> bool:
        """Whether the present thread does shielded work."""
        return self._depth > 0 and threading.get_ident() == self._main

    def take(self, handler: _Handler, number: int, frame: FrameType | None) -> None:
        """Run a handler whose signal came, or put it off."""
        if self._depth == 0:
            handler(number, frame)
            return
        self._put_off.append((handler, number, frame))
        if self._waits_at is not None:
            self._waits_at.put(_WAKE)

    def deliver(self) -> None:
        """Run the handlers that were put off, each, whatever another raises."""
        if self._put_off:
            handler, number, frame = self._put_off.pop(0)
            try:
                handler(number, frame)
            finally:
                self.deliver()

    def wait_at(self, queue: "SimpleQueue[_T]", timeout_s: float) -> _T:
        """Return an item of a queue, or what is none once a handler waits; raise what that does."""
        self._waits_at = queue
        try:
            self.deliver()
            return queue.get(timeout=timeout_s)
        finally:
            self._waits_at = None


def raise_interrupt() -> None:
    """Run the signal handlers that are put off while shielded work runs, which may raise."""
    if shield.covers_this_thread:
        shield.deliver()


def await_unlocked(is_locked: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until something is free, for its taker to take by ``with``; raise what interrupts this.

    Return whether it is free in time.
    """
    deadline = time.monotonic() + timeout_s
    while is_locked():
        raise_interrupt()
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def get_or_interrupt(queue: "SimpleQueue[_T]", timeout_s: float) -> _T:
    """Return the next item of a queue; raise what interrupts shielded work that waits for it.

    Raises:
        Empty: none came in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            item = queue.get_nowait()
        except Empty:
            left_s = max(0.0, deadline - time.monotonic())
            if shield.covers_this_thread:
                item = shield.wait_at(queue, left_s)
            else:
                item = queue.get(timeout=left_s)
        if item is not _WAKE:  # else a handler waits, or has run meanwhile
            return item


shield = Shield()
"""The one of this process."""
os.register_at_fork(after_in_child=shield.forget)
