"""The nodes of a Ray cluster: how actors start there, and whether their versions agree."""

import logging
import os
import platform
import re
import resource
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from distnadam.backends.ray.calls import Callee, is_lost, translate, wait_ready
from distnadam.backends.ray.joined import require_ray, while_ray_lives
from distnadam.backends.ray.processes import process_start_time
from distnadam.config import Options
from distnadam.errors import ConfigError, InsufficientResources, ShardLost, VersionMismatch
from distnadam.protocol.frames import VERSION
from distnadam.transport.available_memory import available_bytes
from distnadam.versions import CORE_PACKAGES, installed_version

log = logging.getLogger("distnadam")

NAMESPACE = "distnadam"
"""Ray's namespace of every named actor and record of ours."""
UNDERSTOOD = ("protocol", "distnadam")
"""The facts that must be equal for two processes to understand each other."""
_MISSING = re.compile(r"No module named \\?'([\w.]+)")
_WHERE = re.compile(r"\bip=([^,)\s]+)")
_START_S = 120.0
_REPORT_EVERY_S = 5.0


def await_start(
    actors: Sequence[Any], options: Options, who: str = "shards"
) -> list[dict[str, str]]:
    """Wait for actors to start, logging how many are missing; return their facts.

    Args:
        actors: are waited for.
        options: what they ask of Ray.
        who: they are.

    Raises:
        InsufficientResources: not all started in time.
        VersionMismatch: a node lacks a package.
        ShardLost: an actor died.
    """
    timeout_s = (
        _START_S if options.start_timeout_s is None else max(options.start_timeout_s, _START_S)
    )
    deadline = time.monotonic() + timeout_s
    waiting = {index: actor.about.remote() for index, actor in enumerate(actors)}
    facts: dict[int, dict[str, str]] = {}
    while waiting:
        require_ray()
        ready = wait_ready(list(waiting.values()), _REPORT_EVERY_S)
        for index in [i for i, ref in waiting.items() if ref in ready]:
            try:
                facts[index] = ray.get(waiting.pop(index))
            except RayError as error:
                if not is_lost(error):
                    ours = start_error(error)
                    raise ours from (None if ours is error else error)
                waiting[index] = actors[index].about.remote()
        if waiting and time.monotonic() >= deadline:
            free = {k: v for k, v in ray.available_resources().items() if not k.startswith("node:")}
            raise InsufficientResources(
                f"{_of(waiting, actors, who)} did not start in {timeout_s:g} s; each "
                f"asks CPU {options.shard_cpus:g},"
                f" memory {options.shard_memory_bytes} and {dict(options.shard_resources)}, free "
                f"in the cluster: {free}; where that is"
                " enough, a node cannot start processes: its logs, under "
                "/tmp/ray/session_latest/logs there, say why"
            )
        if waiting and not ready:
            log.warning("waiting for %s to start", _of(waiting, actors, who))
    return [facts[index] for index in sorted(facts)]


def _of(waiting: Collection[int], actors: Sequence[Any], who: str) -> str:
    return who if len(actors) == 1 else f"{len(waiting)} of {len(actors)} {who}"


def node_facts() -> dict[str, str]:
    """Return this process's node, its limit of open files, the memory that it can still get, and
    the versions that the shards' bits or files depend on.
    """
    node = f"{ray.util.get_node_ip_address()} (id {ray.get_runtime_context().get_node_id()[:12]})"
    facts = {
        "node": node,
        "pid": str(os.getpid()),
        "born": process_start_time(os.getpid()),
        "descriptors": str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        "memory": str(available_bytes()),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "protocol": str(VERSION),
    }
    for package in CORE_PACKAGES:
        facts[package] = installed_version(package) or "missing"
    return facts


def check_versions(
    processes: Sequence[Mapping[str, str]],
    driver: Mapping[str, str],
    packages: Sequence[str] = ("python", "protocol", *CORE_PACKAGES),
) -> None:
    """Raise VersionMismatch naming each node and package that differs from the driver's.

    Args:
        processes: the facts of each.
        driver: those of this process.
        packages: what must be equal.
    """
    differences = {
        f"node {facts['node']} has {package} {facts.get(package)}, the driver has {driver[package]}"
        for facts in processes
        for package in packages
        if facts.get(package) != driver[package]
    }
    if differences:
        raise VersionMismatch(
            f"{'; '.join(sorted(differences))}: install the same versions on every node"
        )


def start_error(error: RayError) -> Exception:
    """Return our error for an actor that did not start, with the whole reason."""
    text = str(error)
    if (missing := _MISSING.search(text)) is not None:
        where = found[1] if (found := _WHERE.search(text)) is not None else "unknown"
        return VersionMismatch(
            f"node {where} lacks the package {missing[1]!r}, which the shards need: install "
            "the same versions on every node"
        )
    if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
        return ShardLost(f"a shard did not start: {text}")  # the cause is below the first line
    return translate(error, Callee(who="a shard that was starting"))


@while_ray_lives()
def nodes_in_words(nodes: Iterable[str]) -> list[str]:
    """Return the address of each of Ray's nodes, with the beginning of Ray's id for it."""
    addresses = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}
    return [f"{addresses.get(node, 'a node that is gone')} ({node[:8]})" for node in nodes]


def node_named(host: str, nodes: Sequence[Mapping[str, Any]], *, besides: str = "") -> str:
    """Return the id of the node of that address, name or beginning of an id.

    Where several nodes are on one host, one that is not `besides`.

    Raises:
        ConfigError: there is none.
    """
    found = nodes_named(host, nodes)
    return next((node for node in found if node != besides), found[0])


def nodes_named(host: str, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the ids of the nodes of that address, name or beginning of an id.

    Raises:
        ConfigError: there is none.
    """
    names = {host}
    with suppress(OSError):
        names.add(socket.gethostbyname(host))
    keys = ("NodeManagerAddress", "NodeManagerHostname", "NodeName")
    found = [
        str(node["NodeID"])
        for node in nodes
        if names & {node.get(key) for key in keys}
        or (host and str(node["NodeID"]).startswith(host))
    ]
    if not found:
        known = ", ".join(sorted({node["NodeManagerAddress"] for node in nodes if node["Alive"]}))
        raise ConfigError(f"{host!r}: is no node of this cluster; those that are: {known}")
    return found
