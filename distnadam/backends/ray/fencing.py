"""How a supervisor makes certain that a process of its optimizer is gone, or stands still, before
another takes its place.
"""

import contextlib
import logging
import os
import time
from collections.abc import Container
from typing import Any

import ray

from distnadam.backends.ray import registry
from distnadam.backends.ray.lease import LeaseManager
from distnadam.backends.ray.placement import RecentlyUnreachable
from distnadam.backends.ray.processes import kill_actor
from distnadam.supervision.process_manager import ShardProcess

log = logging.getLogger("distnadam")

_FENCE_S = 5.0


class Fencing:
    """See the module.

    Args:
        run: begins the names of the optimizer's processes.
        end_on: has processes of another node killed.
        ended: the actors whose end Ray has told.
        lasts_s: seconds for which a shard's leave lasts.
    """

    def __init__(
        self, run: str, kill_on: registry.EndOn, ended: Container[Any], lasts_s: float
    ) -> None:
        self._run, self._end_on, self._ended = run, kill_on, ended
        self._node = ray.get_runtime_context().get_node_id()
        self._fenced: set[ShardProcess] = set()
        self._dismissed: set[ShardProcess] = set()
        self.silent = RecentlyUnreachable()
        self.leases = LeaseManager(lasts_s, self._belongs, lambda: os._exit(1))

    def inherit(self, process: ShardProcess) -> None:
        """Know a shard of an earlier supervisor, which may have given it leave."""
        self.leases.admit(_who(process.index, process.handle), inherited=True)

    def admit(self, actor: Any) -> None:
        """Know a new shard's actor."""
        self.leases.admit(_who(0, actor))

    def fence(self, process: ShardProcess) -> None:
        """Kill a process; where nobody can, wait until it stands still."""
        if process in self._fenced:
            return
        lapses_s = self.leases.refuse(_who(process.index, process.handle))
        ended = self._end(process)
        kill_actor(process.handle)
        if not ended:
            self.silent.add(process.place.node)
        if not ended and lapses_s:
            log.warning(
                "shard %d cannot be reached: waiting %.1f s until it stands still",
                process.index,
                lapses_s,
            )
            time.sleep(lapses_s)
        self._fenced.add(process)

    def terminate(self, *processes: ShardProcess) -> None:
        """End processes by Ray, which tells nobody of it; those that do not obey, by their
        numbers.
        """
        self._dismissed.update(processes)
        for each in processes:
            kill_actor(each.handle)
        registry.end(
            self._run,
            [each.place for each in processes if each.place.pid],
            self._end_on,
            grace_s=registry.GRACE_S,
        )

    def _end(self, process: ShardProcess) -> bool:
        """Kill a process, and return whether it is certain to be gone."""
        place, grace_s = process.place, registry.GRACE_S if process in self._dismissed else 0.0
        if place.pid and place.node == self._node:
            registry.end(
                self._run, [place], self._end_on, grace_s=grace_s
            )  # by its number, since one that is stopped does not obey Ray
            return True
        alive = {each["NodeID"]: each["Alive"] for each in ray.nodes()}
        if not place.node:
            return all(alive.values())  # nobody knows where it was
        if place.pid and alive.get(place.node):
            with contextlib.suppress(Exception):
                ray.get(
                    self._end_on(place.node, [(place.pid, place.born)], grace_s),
                    timeout=grace_s + _FENCE_S,
                )
                registry.forget(self._run, [place])
                return True
        return bool(alive.get(place.node)) and process.handle in self._ended

    def _belongs(self) -> bool:
        return any(node["NodeID"] == self._node and node["Alive"] for node in ray.nodes())


def _who(index: int, actor: Any) -> str:
    """What a shard calls itself where it asks for leave; one that is missing, its index."""
    return str(index) if actor is None else str(actor._actor_id.hex())
