"""How a supervisor makes certain that a process is gone, or stands still, before another takes its
address.
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
    """Ends processes for certain, and gives the leases that end by themselves.

    Args:
        run: begins the names of the optimizer's processes.
        kill_on: kills processes of another node.
        ended: the ids of the actors whose end was reported.
        lease_s: seconds for which a shard's lease is valid.
    """

    def __init__(
        self, run: str, kill_on: registry.KillOn, ended: Container[str], lease_s: float
    ) -> None:
        self._run = run
        self._kill_on = kill_on
        self._ended = ended
        self._node = ray.get_runtime_context().get_node_id()
        self.unreachable = RecentlyUnreachable()
        self.leases = LeaseManager(lease_s, self._belongs, lambda: os._exit(1))

    def inherit(self, process: ShardProcess) -> None:
        """Know a shard of an earlier supervisor, whose lease may still be valid."""
        self.leases.admit(actor_id(process.handle, process.index), inherited=True)

    def admit(self, actor: Any) -> None:
        """Know a new shard's actor."""
        self.leases.admit(actor_id(actor))

    def fence(self, process: ShardProcess) -> None:
        """Kill a process; if nobody can, wait until its lease is over, after which it is silent."""
        valid_s = self.leases.refuse(actor_id(process.handle, process.index))
        ended = self._kill(process)
        kill_actor(process.handle)
        if ended:
            return
        self.unreachable.add(process.address.node)
        if valid_s:
            log.warning(
                "shard %d cannot be reached: waiting %.1f s until its lease is over",
                process.index,
                valid_s,
            )
            time.sleep(valid_s)

    def terminate(self, *processes: ShardProcess) -> None:
        """End processes by Ray, which does not report such an end; by signals if they go on."""
        for each in processes:
            kill_actor(each.handle)
        silent = registry.end(
            self._run,
            [each.address for each in processes if each.address.pid],
            self._kill_on,
            grace_s=registry.GRACE_S,
        )
        self.unreachable.add(*silent)

    def _kill(self, process: ShardProcess) -> bool:
        """Kill a process, and return whether it is certainly gone."""
        address = process.address
        if address.pid and address.node == self._node:
            # by its pid, since a stopped process does not obey Ray
            registry.end(self._run, [address], self._kill_on)
            return True
        try:
            alive = {each["NodeID"]: each["Alive"] for each in ray.nodes()}
        except Exception as error:  # Ray's head does not answer, so nothing is certain
            log.warning("shard %d: cannot ask Ray for its node: %s", process.index, error)
            return False
        if not address.node:
            return all(alive.values())  # it may have been on any node
        if address.pid and alive.get(address.node):
            with contextlib.suppress(Exception):
                ray.get(
                    self._kill_on(address.node, [(address.pid, address.born)], 0.0),
                    timeout=_FENCE_S,
                )
                registry.forget(self._run, [address])
                return True
        return bool(alive.get(address.node)) and actor_id(process.handle) in self._ended

    def _belongs(self) -> bool:
        return any(node["NodeID"] == self._node and node["Alive"] for node in ray.nodes())


def actor_id(actor: Any, index: int = 0) -> str:
    """Return what a shard calls itself when it renews its lease; its index if it is missing."""
    return str(index) if actor is None else str(actor._actor_id.hex())
