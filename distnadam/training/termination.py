"""SIGTERM, which schedulers send before they take a machine away: a run saves and ends in time."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from distnadam.threads import start

STATUS = 128 + signal.SIGTERM
"""The exit status of a process that SIGTERM ended."""

GRACE_S = 25.0
"""Seconds to save in, by default: less than the 30 that Kubernetes and others leave."""


class Termination:
    """Notes a SIGTERM in place of dying of it, in a `with` block of the main thread.

    A handler of the user's own is left alone, and so are other threads, which cannot have one.

    Args:
        grace_s: seconds from the signal to the end of the process, whatever it is doing then.
    """

    def __init__(self, grace_s: float) -> None:
        self.requested = False
        self._grace_s = grace_s
        self._before: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        self.arm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def arm(self) -> None:
        """Take the signal, again after Ray has: it takes it where it is started."""
        present = signal.getsignal(signal.SIGTERM)
        is_free = present is signal.SIG_DFL or getattr(present, "__module__", "").startswith("ray.")
        if is_free and threading.current_thread() is threading.main_thread():
            if self._before is None:
                self._before = present
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._timer = threading.Timer(self._grace_s, self._end)
            self._timer.daemon = True
            start(self._timer)

    def _end(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(
                f"distnadam: SIGTERM: not saved within {self._grace_s:g} s; earlier checkpoints "
                "stay\n"
            )
            sys.stderr.flush()
        os._exit(STATUS)
