"""Optimizers by name: find the supervisor of one, and end one or what is left of it."""

import contextlib
from typing import Any

import ray

from distnadam.backends.ray import registry, stored_restore_points
from distnadam.backends.ray.actors import kill_on
from distnadam.backends.ray.calls import get_all
from distnadam.backends.ray.joined import while_ray_lives
from distnadam.backends.ray.nodes import NAMESPACE
from distnadam.backends.ray.processes import kill_actor
from distnadam.errors import NotRunning

_CLOSE_S = 20.0


def end_optimizer(supervisor: Any, run: str | None) -> None:
    """End an optimizer's processes: by its supervisor if it answers, then whatever is left."""
    if supervisor is not None:
        with contextlib.suppress(Exception):  # it is gone, or stopped
            get_all([supervisor.close.remote()], _CLOSE_S)
        kill_actor(supervisor)
    if run is not None:
        with contextlib.suppress(Exception), while_ray_lives():  # the cluster is gone
            registry.kill_all(run, kill_on)
        with contextlib.suppress(Exception), while_ray_lives():
            stored_restore_points.forget(run)


def named(name: str) -> Any:
    """Return the supervisor of the optimizer of that name.

    Raises:
        NotRunning: there is none; the message lists the names of those that run.
    """
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        known = ray.util.list_named_actors(all_namespaces=True)
        names = sorted(
            entry["name"]
            for entry in known
            if entry["namespace"] == NAMESPACE and "/" not in entry["name"]
        )
        there = f"; those that are: {', '.join(names)}" if names else ""
        raise NotRunning(
            f"no optimizer named {name!r} is running on this Ray cluster{there}"
        ) from error
