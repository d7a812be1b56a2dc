"""Nodes that processes are to leave: those that somebody cordoned, and those that Ray drains.

The cordon is kept in Ray's key-value store, for all optimizers of the cluster: supervisors and
drivers look there, and a successor finds it. Ray drains a node whose `ray start --block` got a
SIGTERM, or that an autoscaler or a cloud's notice announced.
"""

import logging
import time
from collections.abc import Mapping

import ray
from ray._private import state
from ray.experimental import internal_kv
from typing_extensions import override

from distnadam.backends.base import Hosts
from distnadam.backends.ray.nodes import NAMESPACE, node_named
from distnadam.backends.ray.output import PREFIX, PROBE, SUPERVISOR
from distnadam.backends.ray.placement import Avoid, suitable
from distnadam.backends.ray.session import connect_or_start
from distnadam.errors import ConfigError

log = logging.getLogger("distnadam")

_NAMESPACE = f"{NAMESPACE}-cordon"
_LOOK_EVERY_S = 1.0
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
        node = node_named(host, list(nodes.values()))
        if _HEAD in nodes[node]["Resources"]:
            raise ConfigError(f"{host}: runs Ray's head, and the cluster ends with it")
        internal_kv._internal_kv_put(node, b"", namespace=_NAMESPACE)
        return node

    @override
    def uncordon(self, host: str) -> None:
        node = node_named(host, [node for node in ray.nodes() if node["Alive"]])
        internal_kv._internal_kv_del(node, namespace=_NAMESPACE)

    @override
    def processes_on(self, host: str) -> list[str]:
        found = []
        for actor in state.actors().values():
            title = str(actor["ActorClassName"])
            is_there = actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == host
            if is_there and f"{PREFIX} " in title:
                found.append(title[title.index(PREFIX) + len(PREFIX) + 1 :])
        return sorted(each for each in found if not each.endswith(STAY))

    @override
    def announce(self, why: str, left_s: float) -> None:
        node = ray.get_runtime_context().get_node_id()
        deadline_ms = int(1e3 * (time.time() + left_s))
        client = ray._private.worker.global_worker.gcs_client
        client.drain_node(node, _RAY_PREEMPTION, why, deadline_ms)


def _nodes_to_leave() -> frozenset[str]:
    """Return the ids of the nodes that somebody cordoned, or that Ray drains."""
    kept = {key.decode() for key in internal_kv._internal_kv_list("", namespace=_NAMESPACE)}
    return frozenset(kept | state.state.get_draining_nodes().keys())


class Cordon:
    """Which nodes are to be left, as one process knows it: looked up once a second.

    Args:
        ask: what a process asks of its node, by resource.
        selector: labels that its node must have.
    """

    def __init__(self, ask: Mapping[str, float], selector: Mapping[str, str]) -> None:
        self._ask = ask
        self._selector = selector
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
                self._known = _nodes_to_leave()
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
        others = suitable(ray.nodes(), self._selector, self._ask, Avoid(cordoned=nodes))
        if others:
            return nodes
        if self._said != nodes:
            self._said = nodes
            log.warning(
                "node %s is to be left, and no other node suits: its processes stay there",
                ", ".join(sorted(node[:8] for node in nodes)),
            )
        return frozenset()
