"""Processes of this host: identified by pid and start time, and killed."""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from distnadam.backends.ray.joined import has_ray

_FENCE_S = 5.0


def process_start_time(pid: int) -> str:
    """Return a process's start time in clock ticks since boot; "" if it is gone or a zombie.

    It tells the process from an earlier one of the same pid.
    """
    state, born = _state_and_start_time(pid)
    return "" if state in ("Z", "X") else born


def process_token() -> str:
    """Return a new token, which says which process of which node made it."""
    return "/".join(
        (
            ray.get_runtime_context().get_node_id(),
            str(os.getpid()),
            process_start_time(os.getpid()),
            secrets.token_hex(4),
        )
    )


def end_processes(processes: Sequence[tuple[int, str]], grace_s: float = 0.0) -> None:
    """Kill processes of this node, given by pid and start time, and wait until they are gone.

    Args:
        processes: the processes; another one that has the same pid by now is left alone.
        grace_s: seconds in which those that `ray.kill` reached may end by themselves, since Ray
            reports every kill to the user. A stopped one is killed at once.
    """
    patience, deadline = time.monotonic() + grace_s, time.monotonic() + grace_s + _FENCE_S
    while left := [(pid, born) for pid, born in processes if process_start_time(pid) == born]:
        for pid, born in left:
            if time.monotonic() >= patience or _state_and_start_time(pid) == ("T", born):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.001)


def _state_and_start_time(pid: int) -> tuple[str, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def kill_actor(actor: Any) -> None:
    """End an actor by Ray, if it lives."""
    if actor is not None and has_ray():
        with contextlib.suppress(Exception):  # it is dead already
            ray.kill(actor)
