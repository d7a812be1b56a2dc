"""Nodes that processes are to leave: those that somebody cordoned, and those that Ray drains.

The cordon is kept in Ray's key-value store, for all optimizers of the cluster: supervisors and
drivers look there, and a successor finds it. Ray drains a node whose `ray start --block` got a
SIGTERM, or that an autoscaler or a cloud's notice announced.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import state
from ray.experimental import internal_kv
from typing_extensions import override

from distnadam.backends.base import Hosts
from distnadam.backends.ray.nodes import NAMESPACE, nodes_named
from distnadam.backends.ray.output import PREFIX, PROBE, SUPERVISOR
from distnadam.backends.ray.placement import Avoid, room, suitable
from distnadam.backends.ray.session import connect_or_start
from distnadam.errors import ClusterError, ConfigError

log = logging.getLogger("distnadam")

_NAMESPACE = f"{NAMESPACE}-cordon"
_LOOK_EVERY_S = 1.0
_SHOWN = 60
"""Characters of a program's command line."""
STAY = (SUPERVISOR, PROBE)
"""Roles of processes that need not leave: Ray starts a supervisor again elsewhere."""
_HEAD = "node:__internal_head__"
_RAY_PREEMPTION = 2
"""Ray's DRAIN_NODE_REASON_PREEMPTION, which it never declines."""


class RayHosts(Hosts):
    """The hosts of this process's Ray, or of RAY_ADDRESS."""

    def __init__(self) -> None:
        connect_or_start(None, start=False)

    @override
    def cordon(self, host: str) -> str:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        node = _only(host, nodes_named(host, list(nodes.values())))
        if _HEAD in nodes[node]["Resources"]:
            raise ConfigError(f"{host}: runs Ray's head, and the cluster ends with it")
        internal_kv._internal_kv_put(node, b"", namespace=_NAMESPACE)
        return node

    @override
    def uncordon(self, host: str) -> None:
        nodes = ray.nodes()
        found = nodes_named(host, nodes)  # also those that died, and may have been on this host
        alive = [node["NodeID"] for node in nodes if node["Alive"] and node["NodeID"] in found]
        if alive:
            _only(host, alive)
        for node in found:
            internal_kv._internal_kv_del(node, namespace=_NAMESPACE)

    @override
    def processes_on(self, host: str) -> list[str]:
        found = []
        for actor in state.actors().values():
            title = str(actor["ActorClassName"])
            is_there = actor["State"] != "DEAD" and actor["Address"]["NodeID"] == host
            if is_there and f"{PREFIX} " in title:
                found.append(title[title.index(PREFIX) + len(PREFIX) + 1 :])
        return sorted(each for each in found if not each.endswith(STAY)) + _drivers_on(host)

    @override
    def announce(self, why: str, left_s: float) -> None:
        node = ray.get_runtime_context().get_node_id()
        deadline_ms = int(1e3 * (time.time() + left_s))
        client = ray._private.worker.global_worker.gcs_client
        accepted, refusal = client.drain_node(node, _RAY_PREEMPTION, why, deadline_ms)
        if not accepted:
            raise ClusterError(f"{why}: Ray does not drain this node: {refusal}")


def _drivers_on(node: str) -> list[str]:
    """Return the programs that run on a node and have joined Ray, but for this one."""
    mine = ray.get_runtime_context().get_job_id()
    jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info()
    return [
        f"the driver {job.driver_pid} ({job.entrypoint[:_SHOWN]})"
        for number, job in jobs.items()
        if not job.is_dead and number.hex() != mine and job.driver_address.node_id.hex() == node
    ]


def _only(host: str, found: Sequence[str]) -> str:
    """Return the only node found; of several on one host, one goes away while others may stay."""
    if len(found) > 1:
        listed = ", ".join(sorted(node[:8] for node in found))
        raise ConfigError(f"{host!r}: is the name of several nodes, so say the id of one: {listed}")
    return found[0]


def chosen() -> set[str]:
    """Return the ids of the nodes that somebody cordoned, or that Ray drains."""
    kept = {key.decode() for key in internal_kv._internal_kv_list("", namespace=_NAMESPACE)}
    return kept | set(state.state.get_draining_nodes())


class Cordon:
    """Which nodes are to be left, as one process knows it: looked up once a second.

    Args:
        ask: what a process asks of its node, by resource.
        selector: labels that its node must have.
    """

    def __init__(self, ask: Mapping[str, float], selector: Mapping[str, str]) -> None:
        self._ask = ask
        self._selector = selector
        self._all: list[Any] = []  # as `ray.nodes` said, where any is to be left
        self._known: frozenset[str] = frozenset()
        self._looked = float("-inf")
        self._said: frozenset[str] = frozenset()

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes to be left."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            try:
                self._all = ray.nodes() if (left := chosen()) else []
                alive = {node["NodeID"] for node in self._all if node["Alive"]}
                self._known = frozenset(alive & left)
            except Exception as error:  # the head does not answer: what is known stays
                log.debug("the cordon cannot be read: %s", error)
        return self._known

    def to_leave(self) -> frozenset[str]:
        """Return the nodes to be left, if another one could take what is there; else say so once,
        and return none.
        """
        nodes = self.nodes
        if not nodes:
            self._said = frozenset()
            return nodes
        if self._others(nodes):
            return nodes
        self._say(nodes, "no other node suits")
        return frozenset()

    def has_room(self, number: int) -> bool:
        """Whether the other nodes have room now for so many processes; else say so once."""
        nodes = self.nodes
        free = state.available_resources_per_node()
        others = [node["NodeID"] for node in self._others(nodes)]
        if sum(room(free.get(node, {}), self._ask, number) for node in others) >= number:
            return True
        self._say(nodes, "the others have no room now")
        return False

    def _others(self, nodes: frozenset[str]) -> list[Mapping[str, Any]]:
        return suitable(self._all, self._selector, self._ask, Avoid(cordoned=nodes))

    def _say(self, nodes: frozenset[str], why: str) -> None:
        if self._said != nodes:
            self._said = nodes
            listed = ", ".join(sorted(node[:8] for node in nodes))
            log.warning("node %s is to be left, and %s: processes stay there", listed, why)
