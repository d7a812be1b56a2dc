"""Processes of this host: who they are, whatever number they bear, and their end."""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

_FENCE_S = 5.0


def process_start_time(pid: int) -> str:
    """Return what tells a process of this host from an earlier one of the same number; "" where it
    is gone or waits to be buried.
    """
    state, born = _state_and_birth(pid)
    return "" if state in ("Z", "X") else born


def process_token() -> str:
    """Return a new token, which tells by which process of which node it was made."""
    return "/".join(
        (
            ray.get_runtime_context().get_node_id(),
            str(os.getpid()),
            process_start_time(os.getpid()),
            secrets.token_hex(4),
        )
    )


def end_processes(processes: Sequence[tuple[int, str]], grace_s: float = 0.0) -> None:
    """Kill those processes of this node that are still the ones born then, and wait until they are
    gone.

    With a grace they are those that Ray was told to end; only what is stopped, or takes longer, is
    killed: Ray tells users of every kill.
    """
    patience, deadline = time.monotonic() + grace_s, time.monotonic() + grace_s + _FENCE_S
    while left := [(pid, born) for pid, born in processes if process_start_time(pid) == born]:
        for pid, born in left:
            if time.monotonic() >= patience or _state_and_birth(pid) == ("T", born):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.001)


def _state_and_birth(pid: int) -> tuple[str, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def kill_actor(actor: Any) -> None:
    """End an actor, if it is there."""
    if actor is not None and ray.is_initialized():
        with contextlib.suppress(Exception):  # one that is dead already
            ray.kill(actor)
