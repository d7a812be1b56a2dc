"""The ways between the nodes of a running cluster: all are tried, and some measured, for `doctor`.

A process on each node listens as a shard would, tries the others as a worker would, and ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ray
from ray.exceptions import RayError

from distnadam.backends.ray.actors import make_probe
from distnadam.backends.ray.joined import while_ray_lives
from distnadam.backends.ray.nodes import node_named, start_error
from distnadam.backends.ray.session import connect_or_start
from distnadam.errors import ClusterError, LaneError
from distnadam.planning.measuring import HostSpeed, measure_host
from distnadam.transport.available_memory import available_bytes
from distnadam.transport.far_shard import REMEDY
from distnadam.transport.link import (
    Link,
    Links,
    LinkServer,
    Measured,
    Way,
    congestion_control,
    measure,
    reach,
)
from distnadam.transport.shared_memory import why_not_shared
from distnadam.transport.tcp_connection import Endpoint

_START_S = 60.0
_REACH_S = 60.0
_MEASURE_S = 20.0
_TIMES = 3
_MOST_TRIES = 32
"""Connections that one process tries at a time; behind a firewall each takes seconds."""


@dataclass(frozen=True, kw_only=True)
class _Node:
    """What a probe says of its node: where it listens or why not, and what else it has."""

    endpoint: Endpoint | None
    refusal: str | None
    congestion: str
    unshared: str | None
    memory: int

    @property
    def port(self) -> int:
        return 0 if self.endpoint is None else self.endpoint.port


class Probe:
    """One node's end.

    Args:
        ports: the first and the last port to listen at; None for any.
    """

    def __init__(self, ports: tuple[int, int] | None) -> None:
        self._ports = ports
        self._server: LinkServer | None = None

    def listen(self) -> _Node:
        """Listen as a shard would; return where, or why not, and what else the node has."""
        refusal = None
        try:
            self._server = LinkServer(ray.util.get_node_ip_address(), self._ports)
        except LaneError as error:
            refusal = str(error)
        return _Node(
            endpoint=None if self._server is None else self._server.endpoint,
            refusal=refusal,
            congestion=congestion_control(),
            unshared=why_not_shared(),
            memory=available_bytes(),
        )

    def speed(self) -> HostSpeed:
        """Measure this node, while the others measure theirs."""
        return measure_host()

    def link(self, endpoint: Endpoint) -> Link:
        """Measure the way to another node, while the others measure theirs: the best of several,
        as congestion control needs some time to find a cable's speed.

        Raises:
            LaneError: it cannot be reached, or did not answer in time.
        """
        found = [measure(endpoint, _MEASURE_S) for _ in range(_TIMES)]
        return max(found, key=lambda link: min(link.sent_bytes_per_s, link.received_bytes_per_s))

    def reach(self, endpoints: Mapping[str, Endpoint]) -> dict[str, str | None]:
        """Return why each node's endpoint cannot be reached from here, or None if it can."""
        with ThreadPoolExecutor(_MOST_TRIES) as several:
            tried = zip(endpoints, several.map(_why_not, endpoints.values()), strict=True)
            return dict(tried)


def _why_not(endpoint: Endpoint) -> str | None:
    try:
        reach(endpoint)
    except LaneError as error:
        return str(error)
    return None


def measure_hosts(ports: tuple[int, int] | None) -> tuple[list[HostSpeed], list[Link]]:
    """Measure all nodes of this process's Ray, or of RAY_ADDRESS, at once: each what it can do
    alone, then each its way to the next one. The ways are none where there is one node.

    Args:
        ports: `Options.port_range`.

    Raises:
        NotRunning, ClusterError: there is no Ray, it cannot be joined, or a node did not answer.
    """
    connect_or_start(None, start=False)
    return _measure_hosts(ports)


@while_ray_lives()
def _measure_hosts(ports: tuple[int, int] | None) -> tuple[list[HostSpeed], list[Link]]:
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    with _probes(nodes, ports) as probes:
        found = _all({n: p.listen.remote() for n, p in probes.items()}, nodes)
        speeds = _all({n: p.speed.remote() for n, p in probes.items()}, nodes)
        refused = [one.refusal for one in found.values() if one.refusal is not None]
        if len(nodes) == 1 or refused:
            return list(speeds.values()), []
        order = [*found, next(iter(found))]
        ways = {
            node: probes[node].link.remote(found[other].endpoint) for node, other in pairwise(order)
        }
        return list(speeds.values()), list(_all(ways, nodes).values())


def _all(calls: Mapping[str, Any], nodes: Mapping[str, str]) -> dict[str, Any]:
    """Return all answers, by node.

    Raises:
        ClusterError: a node did not answer, or what it was asked failed there.
    """
    answers, errors = _outcomes(calls, _TIMES * _MEASURE_S)
    for node, error in errors.items():
        raise ClusterError(f"node {nodes[node]}: {error}") from error
    return answers


def examine(ports: tuple[int, int] | None, measured: Sequence[str] | None) -> Links:
    """Try the ways between all nodes of this process's Ray, or of RAY_ADDRESS.

    Args:
        ports: `Options.port_range`.
        measured: the hosts to measure the way to, each a node's address, name or id; () means all
            others, None none.

    Raises:
        NotRunning, ClusterError: there is no Ray, or it cannot be joined.
        ConfigError: a host is no node of the cluster.
    """
    connect_or_start(None, start=False)
    return _examine(ports, measured)


@while_ray_lives()
def _examine(ports: tuple[int, int] | None, measured: Sequence[str] | None) -> Links:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    words = {n["NodeID"]: f"{n['NodeManagerAddress']} ({n['NodeID'][:8]})" for n in nodes}
    here = ray.get_runtime_context().get_node_id()
    if measured is not None and not measured:
        chosen = [node for node in words if node != here]
    else:
        chosen = [node_named(host, nodes, besides=here) for host in measured or ()]
    with _probes(words, ports) as probes:
        found, silent = _outcomes({n: p.listen.remote() for n, p in probes.items()}, _START_S)
        ends = {node: one.endpoint for node, one in found.items() if one.endpoint is not None}
        tried, lost = _outcomes({n: probes[n].reach.remote(ends) for n in found}, _REACH_S)
        ways = [
            _way(words, sender, receiver, found[receiver], reached.get(receiver))
            for sender, reached in tried.items()
            for receiver in found
        ]
        from_here = {way.receiver: way for way in ways if way.sender == words[here]}
        results = [
            _measured(words[node], found.get(node), from_here.get(words[node])) for node in chosen
        ]
    problems = [f"{words[node]}: {error}" for node, error in [*silent.items(), *lost.items()]]
    refusals = {words[node]: one.refusal for node, one in found.items() if one.refusal}
    problems += [f"{node}: {refusal}; {REMEDY}" for node, refusal in refusals.items()]
    problems += _unreachable(ways, {words[node]: end.port for node, end in ends.items()})
    problems += [f"the way to {m.host}: {m.why_not}" for m in results if m.why_not]
    return Links(
        ways=tuple(ways),
        measured=tuple(results),
        problems=tuple(problems),
        memory={words[node]: one.memory for node, one in found.items()},
    )


def _way(
    words: Mapping[str, str], sender: str, receiver: str, there: _Node, refusal: str | None
) -> Way:
    carrier, why = "TCP", f"it answers at port {there.port}"
    if sender == receiver:
        carrier, why = "shared memory", "the same node"
        if there.unshared is not None:
            carrier, why = "Ray objects", f"shared memory does not work there: {there.unshared}"
    elif (against := there.refusal or refusal) is not None:
        carrier, why = "Ray objects", against
    return Way(sender=words[sender], receiver=words[receiver], carrier=carrier, why=why)


def _measured(host: str, there: _Node | None, way: Way | None) -> Measured:
    """Measure the way from this process to a node, if TCP would be used."""
    link, why_not = None, None
    congestion = (congestion_control(), "unknown" if there is None else there.congestion)
    by_tcp = way is None or way.carrier == "TCP"
    if there is not None and there.endpoint is not None and by_tcp:
        try:
            link = measure(there.endpoint, _MEASURE_S)
        except LaneError as error:
            why_not = str(error)
    return Measured(host=host, link=link, why_not=why_not, congestion=congestion, way=way)


def _unreachable(ways: Sequence[Way], ports: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each node that listens and that others cannot reach."""
    for receiver, port in ports.items():
        refused = {
            way.sender: way.why
            for way in ways
            if way.receiver == receiver != way.sender and way.carrier != "TCP"
        }
        if refused:
            yield (
                f"{', '.join(refused)} cannot reach {receiver} at port {port} "
                f"({next(iter(refused.values()))}); {REMEDY}"
            )


@contextmanager
def _probes(nodes: Mapping[str, str], ports: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """Make a probe on each node; end them afterwards."""
    probes = {node: make_probe(Probe, node, ports) for node in nodes}
    try:
        yield probes
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _outcomes(
    calls: Mapping[str, Any], timeout_s: float
) -> tuple[dict[str, Any], dict[str, Exception]]:
    """Return the answers, and our errors where there is none, by node."""
    refs = list(calls.values())
    ready = set(ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0]) if refs else set()
    answers: dict[str, Any] = {}
    errors: dict[str, Exception] = {}
    for node, ref in calls.items():
        if ref not in ready:
            errors[node] = ClusterError(f"no process there answered in {timeout_s:g} s")
            continue
        try:
            answers[node] = ray.get(ref)
        except RayError as error:
            errors[node] = start_error(error)
    return answers, errors
