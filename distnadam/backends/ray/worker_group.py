"""A worker group whose members are actors of this driver. What they compute is not known here."""

import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from typing_extensions import override

from distnadam.backends.base import WorkerGroup
from distnadam.backends.ray import registry
from distnadam.backends.ray.actors import kill_on, make_member
from distnadam.backends.ray.calls import Callee, ignore_results, translate
from distnadam.backends.ray.joined import has_ray, require_ray, while_ray_lives
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
        require_ray()
        self._make = make
        self._options = options
        self._first_node = secrets.randbelow(2**16)  # groups begin on different nodes
        self._unreachable = RecentlyUnreachable()
        self._actors = {rank: self._make_member(rank) for rank in range(size)}
        self._places = {actor: actor.about.remote() for actor in self._actors.values()}
        self._calls: dict[Any, int] = {}

    @override
    @while_ray_lives()
    def call(self, rank: int, method: str, *args: Any) -> None:
        self._calls[self._actors[rank].call.remote(method, args)] = rank

    @override
    @while_ray_lives()
    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        ready, _ = (
            ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
            if self._calls
            else ([], [])
        )
        ended = [(self._calls.pop(ref), ref) for ref in ready]
        return [(rank, self._result(rank, ref)) for rank, ref in ended]

    @override
    @while_ray_lives()
    def end(self, rank: int) -> None:
        self._end([self._actors[rank]])
        self._forget([ref for ref, called in self._calls.items() if called == rank])

    @override
    @while_ray_lives()
    def start(self, rank: int) -> None:
        actor = self._make_member(rank)
        self._actors[rank] = actor
        self._places[actor] = actor.about.remote()

    @override
    def close(self) -> None:
        self._end(list(self._actors.values()))
        self._forget(list(self._calls))

    def _make_member(self, rank: int) -> Any:
        return make_member(self._make, rank, self._options, self._first_node, self._unreachable.now)

    def _forget(self, refs: list[Any]) -> None:
        for ref in refs:
            del self._calls[ref]
        ignore_results(refs)

    def _end(self, actors: list[Any]) -> None:
        """End processes, stopped ones included."""
        if not has_ray():
            return
        refs = [self._places.pop(actor) for actor in actors if actor in self._places]
        places = []
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []:
            with contextlib.suppress(Exception):  # it never started
                places.append(ray.get(ref))
        for actor in actors:
            kill_actor(actor)
        self._unreachable.add(*registry.kill(places, kill_on, grace_s=registry.GRACE_S))

    def _result(self, rank: int, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayError as error:
            callee = Callee(who=f"worker {rank}", died=WorkerLost, unavailable=WorkerLost)
            return translate(error, callee)
