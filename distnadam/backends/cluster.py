"""What we ask of a Ray cluster and find out about it: joining or starting it, room for the shards, versions on its nodes."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from distnadam.config import Options
from distnadam.errors import ClusterError, InsufficientResources, NotRunning, ShardLost, VersionMismatch
from distnadam.messages import ShardSpec

log = logging.getLogger("distnadam")

NAMESPACE = "distnadam"
_NODE = "ray.io/node-id"
_FENCE_S = 5.0
_PACKAGES = ("distnadam", "numpy", "ray", "ml_dtypes", "msgpack", "optree", "safetensors", "xxhash")
_MISSING = re.compile(r"No module named \\?'([\w.]+)")
_WHERE = re.compile(r"\bip=([^,)\s]+)")
_NODE = "ray.io/node-id"
_START_S = 120.0
_REPORT_EVERY_S = 5.0


class OwnRay:
    """A Ray that we started, behind a token that only this process and its children know."""

    def __init__(self, options: Options | None) -> None:
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray asks for one by itself, and would write it to the home
        store = options.object_store_bytes if options is not None else None
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=store,
            namespace="distnadam-driver",
        )

    def shut_down(self) -> None:
        """Stop every process of this Ray; the environment keeps the token, which Ray has read for good."""
        ray.shutdown()


def ensure_ray(options: Options | None, *, start: bool = True) -> OwnRay | None:
    """Join the Ray of this process or of `RAY_ADDRESS`; where there is neither, start and return our own, or raise NotRunning."""
    if ray.is_initialized():
        return None
    address = os.environ.get("RAY_ADDRESS")
    if not address and not start:
        raise NotRunning("no Ray runs in this process and RAY_ADDRESS is not set: there is nothing to connect to")
    if not address:
        return OwnRay(options)
    try:
        ray.init(address=address, log_to_driver=False, namespace="distnadam-driver")
    except Exception as error:
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        raise ClusterError(f"cannot join the Ray at RAY_ADDRESS={address} (RAY_AUTH_MODE is {mode}): {error}") from error
    return None


def actor_options(spec: ShardSpec, label: str | None, apart_from: str | None) -> dict[str, Any]:
    """Return what a shard's actor asks of Ray; one with a label is found by it, and outlives who made it.

    It goes to another node than `apart_from`, where one has the labels that it must have.
    """
    options, selector = spec.options, dict(spec.options.label_selector)
    asked: dict[str, Any] = {
        "num_cpus": options.shard_cpus,
        "resources": dict(options.shard_resources),
        "label_selector": selector,
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if options.spread:
        asked["scheduling_strategy"] = "SPREAD"
    if options.shard_memory_bytes:
        asked["memory"] = options.shard_memory_bytes
    if apart_from is not None:
        asked |= {"label_selector": selector | {_NODE: f"!{apart_from}"}, "fallback_strategy": [{"label_selector": selector}]}
    if label is not None:
        asked |= {"name": label, "namespace": NAMESPACE, "lifetime": "detached"}
    return asked


def check_fits(options: Options, num_shards: int) -> None:
    """Raise InsufficientResources where the nodes, even empty, cannot hold the shards; wait first as long as `start_timeout_s` says."""
    ask = {"CPU": options.shard_cpus, "memory": float(options.shard_memory_bytes), **options.shard_resources}
    ask = {name: amount for name, amount in ask.items() if amount > 0}
    deadline = time.monotonic() + (options.start_timeout_s or 0.0)
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"] and _labelled(node, options.label_selector)]
        room = sum(_room(node["Resources"], ask, num_shards) for node in nodes)
        if room >= num_shards:
            return
        has = {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ask}
        wanted = ", ".join(f"{name} {amount:g} each, the nodes have {has[name]:g} in all" for name, amount in ask.items()) or "no resource"
        told = f"{num_shards} shards ask {wanted}: {len(nodes)} suitable node(s) have room for {room}"
        if time.monotonic() >= deadline:
            remedy = "ask for less in Options, or add nodes (Options(start_timeout_s=...) waits for them)"
            raise InsufficientResources(f"{told}; {remedy}")
        log.warning("waiting for nodes: %s", told)
        time.sleep(min(_REPORT_EVERY_S, max(0.1, deadline - time.monotonic())))


def await_start(refs: Sequence[Any], options: Options) -> list[dict[str, str]]:
    """Return every shard's facts; say every few seconds who is awaited; raise where they do not all start in time."""
    timeout_s = _START_S if options.start_timeout_s is None else max(options.start_timeout_s, _START_S)
    deadline = time.monotonic() + timeout_s
    remaining = list(refs)
    while remaining:
        ready, remaining = ray.wait(remaining, num_returns=len(remaining), timeout=_REPORT_EVERY_S)
        _raise_failed(ready)
        if remaining and time.monotonic() >= deadline:
            free = {k: v for k, v in ray.available_resources().items() if not k.startswith("node:")}
            raise InsufficientResources(
                f"{len(remaining)} of {len(refs)} shards did not start in {timeout_s:g} s; each asks CPU {options.shard_cpus:g},"
                f" memory {options.shard_memory_bytes} and {dict(options.shard_resources)}, free in the cluster: {free}"
            )
        if remaining:
            log.warning("waiting for %d of %d shards to start", len(remaining), len(refs))
    return list(ray.get(list(refs)))


def node_facts() -> dict[str, str]:
    """Return this process's node and the versions of what the shards' bits or files depend on."""
    node = f"{ray.util.get_node_ip_address()} (id {ray.get_runtime_context().get_node_id()[:12]})"
    facts = {
        "node": node,
        "pid": str(os.getpid()),
        "born": process_born(os.getpid()),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "missing"
    return facts


def process_born(pid: int) -> str:
    """Return what tells a process of this host from an earlier one of the same number; "" where it is gone or waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def process_token() -> str:
    """Return a new token of which `token_has_ended` can say, on this node, whether the process that made it is gone."""
    return "/".join((ray.get_runtime_context().get_node_id(), str(os.getpid()), process_born(os.getpid()), secrets.token_hex(4)))


def token_has_ended(token: str, node: str) -> bool:
    """Whether the process that made a token is known, on this node, to be gone; of one of another node nothing is known."""
    where, *process = token.split("/")
    return where == node and len(process) == 3 and process_born(int(process[0])) != process[1]


def end_process(pid: int, born: str) -> None:
    """Kill a process of this node, if it is still the one that was born then, and wait until it is gone."""
    with contextlib.suppress(OSError):
        if process_born(pid) == born:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _FENCE_S
        while process_born(pid) == born and time.monotonic() < deadline:
            time.sleep(0.001)


def kill(actor: Any) -> None:
    """End an actor, if it is there."""
    if actor is not None and ray.is_initialized():
        with contextlib.suppress(Exception):  # one that is dead already
            ray.kill(actor)


def check_versions(shards: Sequence[Mapping[str, str]], driver: Mapping[str, str]) -> None:
    """Raise VersionMismatch naming each node and package that differs from the driver's."""
    told = {
        f"node {facts['node']} has {package} {facts[package]}, the driver has {driver[package]}"
        for facts in shards
        for package in ("python", *_PACKAGES)
        if facts[package] != driver[package]
    }
    if told:
        raise VersionMismatch(f"{'; '.join(sorted(told))}: install the same versions on every node")


def _raise_failed(ready: Sequence[Any]) -> None:
    for ref in ready:
        try:
            ray.get(ref)
        except RayActorError as error:
            text = str(error)
            if (missing := _MISSING.search(text)) is not None:
                where = found[1] if (found := _WHERE.search(text)) is not None else "unknown"
                raise VersionMismatch(
                    f"node {where} lacks the package {missing[1]!r}, which the shards need: install the same versions on every node"
                ) from error
            raise ShardLost(f"a shard did not start: {text}") from error


def _labelled(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    return all(_meets(node.get("Labels", {}).get(key), wanted) for key, wanted in selector.items())


def _meets(label: str | None, wanted: str) -> bool:
    """Whether a label is as Ray's selectors say it: value, !value, in(a,b) or !in(a,b)."""
    plain = wanted.removeprefix("!")
    among = plain[3:-1].split(",") if plain.startswith("in(") else [plain]
    return (label in [value.strip() for value in among]) == (plain == wanted)


def _room(resources: Mapping[str, float], ask: Mapping[str, float], most: int) -> int:
    return min([int((resources.get(name, 0.0) + 1e-9) // amount) for name, amount in ask.items()], default=most)
