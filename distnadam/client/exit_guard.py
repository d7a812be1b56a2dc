"""A process that ends: it finishes its background saves first, and ends with a status that is not
0 if one failed and no call has said so.
"""

import atexit
import logging
import os
import sys
import threading
from typing import Protocol

_STATUS = 1


class Unfinished(Protocol):
    """A save in the background."""

    def done(self) -> bool:
        """Whether it has ended."""

    def wait(self) -> bool:
        """Wait for its end and return whether it succeeded."""

    @property
    def unseen(self) -> BaseException | None:
        """The error that it ended with and that no call has raised."""


class ExitGuard:
    """The background saves of this process that have not succeeded, or failed with a word."""

    def __init__(self) -> None:
        self._saves: set[Unfinished] = set()

    def watch(self, save: Unfinished) -> None:
        """Wait for a save at the end of the process, unless it has ended before."""
        self._saves = {each for each in self._saves if not each.done() or each.unseen is not None}
        self._saves.add(save)

    def finish(self) -> None:
        """Wait for every save; say on standard error which have failed."""
        try:
            for save in self._saves:
                if not save.wait() and save.unseen is not None:
                    sys.stderr.write(f"distnadam: a background save failed: {save.unseen}\n")
        except KeyboardInterrupt:
            sys.stderr.write("distnadam: a background save was interrupted and is not complete\n")
            os._exit(130)

    def end(self) -> None:
        """End the process now, if a failure would else leave it with status 0."""
        if any(save.unseen is not None for save in self._saves):
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):  # nobody reads it any more
                    continue
            os._exit(_STATUS)

    def after_fork(self) -> None:
        """Leave the parent's saves to the parent."""
        self._saves = set()


GUARD = ExitGuard()

# `atexit` runs when executors take no more work, and a save needs those of others (fsspec's, Ray's)
getattr(threading, "_register_atexit", atexit.register)(GUARD.finish)
atexit.register(GUARD.end)  # registered early, and so called after what is registered later
os.register_at_fork(after_in_child=GUARD.after_fork)
