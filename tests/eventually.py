"""Waiting in a test for what another process or thread brings about."""

import time
from collections.abc import Callable


def eventually(what: Callable[[], bool], patience_s: float = 60.0) -> None:
    """Wait until something holds; fail if it does not in time."""
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, f"not within {patience_s:g} s"
        time.sleep(0.01)
