"""What we find out about a Ray cluster, and do to it: versions on its nodes, calls that it loses, processes to end."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from distnadam.config import Options
from distnadam.errors import (
    DistNadamError,
    InsufficientResources,
    ShardLost,
    StepTimeout,
    VersionMismatch,
)

log = logging.getLogger("distnadam")

NAMESPACE = "distnadam"
_FENCE_S = 5.0
_PACKAGES = ("distnadam", "numpy", "ray", "ml_dtypes", "msgpack", "optree", "safetensors", "xxhash")
_MISSING = re.compile(r"No module named \\?'([\w.]+)")
_WHERE = re.compile(r"\bip=([^,)\s]+)")
_START_S = 120.0
_REPORT_EVERY_S = 5.0
_AGAIN_S = 0.05

_K = TypeVar("_K")


def await_start(actors: Sequence[Any], options: Options) -> list[dict[str, str]]:
    """Return every actor's facts; say every few seconds who is awaited; raise where they do not all start in time."""
    timeout_s = _START_S if options.start_timeout_s is None else max(options.start_timeout_s, _START_S)
    deadline = time.monotonic() + timeout_s
    waiting, facts = {index: actor.about.remote() for index, actor in enumerate(actors)}, dict[int, dict[str, str]]()
    while waiting:
        ready = ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=_REPORT_EVERY_S)[0]
        for index in [i for i, ref in waiting.items() if ref in ready]:
            try:
                facts[index] = _started(waiting.pop(index))
            except ActorUnavailableError:
                waiting[index] = actors[index].about.remote()  # the call was lost
        if waiting and time.monotonic() >= deadline:
            free = {k: v for k, v in ray.available_resources().items() if not k.startswith("node:")}
            raise InsufficientResources(
                f"{len(waiting)} of {len(actors)} shards did not start in {timeout_s:g} s; each asks CPU {options.shard_cpus:g},"
                f" memory {options.shard_memory_bytes} and {dict(options.shard_resources)}, free in the cluster: {free}; where that is"
                " enough, a node cannot start processes: its logs, under /tmp/ray/session_latest/logs there, say why"
            )
        if waiting and not ready:
            log.warning("waiting for %d of %d shards to start", len(waiting), len(actors))
    return [facts[index] for index in sorted(facts)]


def until_answered(call: Callable[[], Any], *, timeout_s: float, first: Any = None) -> Any:
    """Return the answer of a call that does no harm twice, made again as long as Ray loses it; `first` is one on its way already.

    Raises:
        DistNadamError: what was raised there.
        StepTimeout: there was no answer in time.
        RayActorError: the actor is dead.
    """
    deadline, ref = time.monotonic() + timeout_s, first if first is not None else call()
    while True:
        try:
            return ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except ActorUnavailableError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_AGAIN_S)
            ref = call()
        except GetTimeoutError as error:
            raise StepTimeout(f"an actor did not answer in {timeout_s:g} s") from error
        except RayTaskError as error:
            raise own(error) from None


def all_answered(keys: Iterable[_K], call: Callable[[_K], Any], *, timeout_s: float) -> dict[_K, Any]:
    """Return by key the answers of calls as `until_answered` makes them, all at once."""
    asked = {key: call(key) for key in keys}
    return {key: until_answered(lambda key=key: call(key), timeout_s=timeout_s, first=ref) for key, ref in asked.items()}  # type: ignore[misc]


def insist(call: Callable[[], Any]) -> None:
    """Make a call that does no harm twice, and whose answer nobody waits for, again as long as Ray loses it."""

    def again() -> None:
        with contextlib.suppress(Exception):  # Ray was shut down, or the actor is gone
            insist(call)

    def done(future: Any) -> None:
        if isinstance(future.exception(), ActorUnavailableError):
            timer = threading.Timer(_AGAIN_S, again)
            timer.daemon = True
            timer.start()

    call().future().add_done_callback(done)


def own(error: RayTaskError) -> Exception:
    """Return the error of ours that an actor's call raised, however many actors it came through; else the given one."""
    cause: Any = error
    while isinstance(cause, RayTaskError) and cause.cause is not None:
        cause = cause.cause
    return cause if isinstance(cause, DistNadamError) else error


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
    state, born = _state_and_birth(pid)
    return "" if state in ("Z", "X") else born


def process_token() -> str:
    """Return a new token, which tells by which process of which node it was made."""
    return "/".join((ray.get_runtime_context().get_node_id(), str(os.getpid()), process_born(os.getpid()), secrets.token_hex(4)))


def end_processes(processes: Sequence[tuple[int, str]], grace_s: float = 0.0) -> None:
    """Kill those processes of this node that are still the ones born then, and wait until they are gone.

    With a grace they are those that Ray was told to end; only what is stopped, or takes longer, is killed: Ray tells users of every kill.
    """
    patience, deadline = time.monotonic() + grace_s, time.monotonic() + grace_s + _FENCE_S
    while left := [(pid, born) for pid, born in processes if process_born(pid) == born]:
        for pid, born in left:
            if time.monotonic() >= patience or _state_and_birth(pid) == ("T", born):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.001)


def _state_and_birth(pid: int) -> tuple[str, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


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


def _started(ref: Any) -> dict[str, str]:
    try:
        facts: dict[str, str] = ray.get(ref)
        return facts
    except ActorUnavailableError:
        raise
    except RayActorError as error:
        text = str(error)
        if (missing := _MISSING.search(text)) is not None:
            where = found[1] if (found := _WHERE.search(text)) is not None else "unknown"
            raise VersionMismatch(
                f"node {where} lacks the package {missing[1]!r}, which the shards need: install the same versions on every node"
            ) from error
        raise ShardLost(f"a shard did not start: {text}") from error
