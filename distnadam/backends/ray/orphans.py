"""Shards and standbys outlive their supervisor, which Ray restarts; where it has ended for good,
nobody can reach them any more, and they end too.
"""

import threading
from collections.abc import Callable
from typing import Any

import ray

from distnadam.backends.ray.calls import retry_in_background
from distnadam.backends.ray.nodes import NAMESPACE

_PAUSE_S = 0.2


def is_named(supervisor: Any, name: str) -> bool:
    """Whether the name is still this supervisor's, so that Ray restarts it if it died.

    A supervisor that was ended has lost its name.
    """
    try:
        return bool(ray.get_actor(name, namespace=NAMESPACE) == supervisor)
    except ValueError:
        return False
    except Exception:  # the cluster does not answer, so nothing is known
        return True


def on_end_of(supervisor: Any, name: str, ended: Callable[[], None]) -> None:
    """Have a function called once a named supervisor has ended for good, in another thread."""

    def look() -> None:
        if is_named(supervisor, name):
            on_end_of(supervisor, name, ended)
        else:
            ended()

    def look_soon() -> None:  # not in the thread of Ray's that calls this, which must not wait
        timer = threading.Timer(_PAUSE_S, look)
        timer.daemon = True
        timer.start()

    retry_in_background(supervisor.linger.remote, on_death=look_soon)
