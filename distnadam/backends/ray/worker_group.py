"""A group of ranks, each an actor of this driver."""

import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from distnadam.backends.base import WorkerGroup
from distnadam.backends.ray import registry
from distnadam.backends.ray.actors import kill_on, make_member
from distnadam.backends.ray.calls import Callee, ignore_results, require_ray, translate
from distnadam.backends.ray.placement import RecentlyUnreachable
from distnadam.backends.ray.processes import kill_actor
from distnadam.config import Options
from distnadam.errors import WorkerLost


class RayWorkerGroup(WorkerGroup):
    """Actors of this driver.

    Args:
        size: ranks.
        make: makes a rank's object, in its actor.
        options: say what each asks of Ray.
    """

    def __init__(self, size: int, make: Callable[[int], Any], options: Options) -> None:
        self._make, self._options = make, options
        self._first = secrets.randbelow(2**16)  # several teams begin on different nodes
        self._silent = RecentlyUnreachable()
        self._actors = {rank: self._make_member(rank) for rank in range(size)}
        self._places = {actor: actor.about.remote() for actor in self._actors.values()}
        self._calls: dict[Any, int] = {}

    def call(self, rank: int, method: str, *args: Any) -> None:
        """See `WorkerGroup.call`."""
        self._calls[self._actors[rank].call.remote(method, args)] = rank

    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        """See `WorkerGroup.results`."""
        require_ray()
        ready, _ = (
            ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
            if self._calls
            else ([], [])
        )
        ended = [(self._calls.pop(ref), ref) for ref in ready]
        return [(rank, self._result(rank, ref)) for rank, ref in ended]

    def replace(self, rank: int) -> None:
        """See `WorkerGroup.replace`."""
        self._end([self._actors[rank]])
        self._forget([ref for ref, called in self._calls.items() if called == rank])
        actor = self._actors[rank] = self._make_member(rank)
        self._places[actor] = actor.about.remote()

    def close(self) -> None:
        """See `WorkerGroup.close`."""
        self._end(list(self._actors.values()))
        self._forget(list(self._calls))

    def _make_member(self, rank: int) -> Any:
        return make_member(self._make, rank, self._options, self._first, self._silent.now)

    def _forget(self, refs: list[Any]) -> None:
        for ref in refs:
            del self._calls[ref]
        ignore_results(refs)

    def _end(self, actors: list[Any]) -> None:
        """End processes, also those that are stopped and obey nobody."""
        if not ray.is_initialized():
            return
        refs = [self._places.pop(actor) for actor in actors if actor in self._places]
        places = []
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []:
            with contextlib.suppress(Exception):  # it never ran
                places.append(ray.get(ref))
        for actor in actors:
            kill_actor(actor)
        self._silent.add(*registry.kill(places, kill_on, grace_s=registry.GRACE_S))

    def _result(self, rank: int, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayError as error:
            callee = Callee(who=f"worker {rank}", died=WorkerLost, unavailable=WorkerLost)
            return translate(error, callee)
