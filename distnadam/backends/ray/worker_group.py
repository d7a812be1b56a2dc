"""A worker group whose members are actors of this driver. What they compute is not known here."""

import contextlib
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from typing_extensions import override

from distnadam.backends.base import WorkerGroup
from distnadam.backends.ray import registry
from distnadam.backends.ray.actors import kill_on, make_member
from distnadam.backends.ray.calls import Callee, ignore_results, translate
from distnadam.backends.ray.cordon import Cordon
from distnadam.backends.ray.joined import has_ray, require_ray, while_ray_lives
from distnadam.backends.ray.nodes import nodes_in_words
from distnadam.backends.ray.output import where_reports_are
from distnadam.backends.ray.placement import Avoid, RecentlyUnreachable
from distnadam.backends.ray.processes import kill_actor
from distnadam.config import Options
from distnadam.errors import ClusterError, Unrecoverable, VersionMismatch, WorkerLost
from distnadam.planning.requests import process_awaited, worker_ask
from distnadam.waiting import REPORT_WAIT_S, say_waiting

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MISSING = re.compile(r"ModuleNotFoundError: ")
_OURS = re.compile(r"distnadam\.errors\.(\w+): (.*)")
_WHERE = re.compile(r"\bip=([^,)\s]+)")


class RayWorkerGroup(WorkerGroup):
    """Actors of this driver.

    Args:
        size: ranks.
        make: makes a rank's object, in its actor.
        options: say what each asks of Ray.
        together: consecutive ranks whose gradients are summed, so that they are best on one node.
    """

    def __init__(
        self, size: int, make: Callable[[int], Any], options: Options, together: int = 1
    ) -> None:
        require_ray()
        self._make = make
        self._options = options
        self._together = together
        self._first_node = secrets.randbelow(2**16)  # groups begin on different nodes
        self._unreachable = RecentlyUnreachable()
        self._cordon = Cordon(worker_ask(options), options.worker_label_selector)
        self._actors: dict[int, Any] = {}
        self._places: dict[Any, Any] = {}
        self._starting: dict[int, float] = {}  # when each was asked for
        self._hosts: dict[int, str] = {}  # of those that are known to have started
        self._calls: dict[Any, int] = {}
        for rank in range(size):
            self.start(rank)

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
        self._report_waiting()
        ended = [(self._calls.pop(ref), ref) for ref in ready]
        return [(rank, self._result(rank, ref)) for rank, ref in ended]

    @override
    @while_ray_lives()
    def hosts(self) -> dict[int, str]:
        refs = {
            rank: self._places[actor]
            for rank, actor in self._actors.items()
            if rank not in self._hosts
        }
        if refs:
            started = set(ray.wait(list(refs.values()), num_returns=len(refs), timeout=0)[0])
            nodes: dict[int, str] = {}
            for rank, ref in refs.items():
                if ref in started:
                    with contextlib.suppress(RayError):  # it never started
                        nodes[rank] = ray.get(ref).node
            self._hosts |= dict(zip(nodes, nodes_in_words(nodes.values()), strict=True))
        return dict(self._hosts)

    @override
    @while_ray_lives()
    def to_leave(self) -> frozenset[int]:
        left = self._cordon.to_leave()
        ranks = frozenset(rank for rank in self._actors if left and self._node_of(rank) in left)
        # one that ended before there is room for it elsewhere would hold up all others
        return ranks if ranks and self._cordon.has_room(len(ranks)) else frozenset()

    @override
    @while_ray_lives()
    def end(self, rank: int) -> None:
        self._hosts.pop(rank, None)
        self._end([self._actors[rank]])
        self._forget([ref for ref, called in self._calls.items() if called == rank])

    @override
    @while_ray_lives()
    def start(self, rank: int) -> None:
        actor = self._make_member(rank)
        self._actors[rank] = actor
        self._places[actor] = actor.about.remote()
        self._starting[rank] = time.monotonic()

    @override
    def close(self) -> None:
        self._end(list(self._actors.values()))
        self._forget(list(self._calls))

    def _make_member(self, rank: int) -> Any:
        place = self._first_node + rank // self._together
        avoid = Avoid(unreachable=self._unreachable.now, cordoned=self._cordon.to_leave())
        return make_member(self._make, rank, self._options, place, avoid)

    def _node_of(self, rank: int) -> str | None:
        """Return a member's node; None as long as it starts."""
        place = self._places[self._actors[rank]]
        if not ray.wait([place], timeout=0)[0]:
            return None
        try:
            node: str = ray.get(place).node
        except RayError:  # it died
            return None
        return node

    def _report_waiting(self) -> None:
        """Log once which workers have long had no process, and what they ask for."""
        now = time.monotonic()
        for rank, began in list(self._starting.items()):
            if now - began < REPORT_WAIT_S:
                continue
            del self._starting[rank]
            if not ray.wait([self._places[self._actors[rank]]], timeout=0)[0]:
                free = ray.available_resources()
                say_waiting(f"worker {rank}", process_awaited(self._options, free))

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
            if (failure := start_failure(rank, error)) is not None:
                return failure
            callee = Callee(
                who=f"worker {rank}",
                died=WorkerLost,
                unavailable=WorkerLost,
                remedy=where_reports_are(),
            )
            return translate(error, callee)


def start_failure(rank: int, error: RayError) -> ClusterError | None:
    """Return why a worker could not be made where it was to run; None if it was, and died.

    Where it is WorkerLost, as a shard that it looked for has died, starting it again may help. Else
    that would change nothing: what it is made of could not be imported there, or failed, or the
    shards cannot be recovered.
    """
    if not isinstance(error, RayActorError) or not error.actor_init_failed:
        return None
    report = _COLOURS.sub("", str(error)).strip()
    cause = report.splitlines()[-1]
    if (own := _OURS.match(cause)) is not None:  # Ray keeps the text of an error alone
        kind = Unrecoverable if own[1] == Unrecoverable.__name__ else WorkerLost
        ours: ClusterError = kind(f"worker {rank}: it could not start: {own[2]}")
        ours.__cause__ = error
        return ours
    host = f" on {found[1]}" if (found := _WHERE.search(report)) is not None else ""
    remedy = (
        ": install it there, or keep it beside the task's file" if _MISSING.match(cause) else ""
    )
    ours = (VersionMismatch if remedy else ClusterError)(
        f"worker {rank}{host}: what it needs cannot be loaded there: {cause}{remedy}"
    )
    if not remedy:
        ours.add_note(report)
    ours.__cause__ = error
    return ours
