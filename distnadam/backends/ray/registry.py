"""The processes of optimizers as the cluster knows them, whether or not their supervisor lives.

Named actors find processes that respond; a record in Ray's key-value store (node, pid, start time)
finds stopped ones, which only a signal to the pid ends. Each process writes its record before
anything else. Names and records begin with the optimizer's `run`.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.experimental import internal_kv

from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.nodes import NAMESPACE
from distnadam.backends.ray.processes import end_processes, kill_actor, process_start_time
from distnadam.protocol.messages import ShardSpec

KillOn = Callable[[str, Sequence[tuple[int, str]], float], Any]
"""Has processes of a node killed there, given by pid and start time; returns a reference."""
GRACE_S = 10.0
"""Seconds in which a process may end by itself after `ray.kill`."""
_END_S = 5.0


def new_run(name: str | None) -> str:
    """Return what begins the names of a new optimizer's processes."""
    return f"{name or '-'}/{secrets.token_hex(6)}"


def runs_of(name: str) -> str:
    """Return what begins the names of the processes of every optimizer that has this name, or had
    it.
    """
    return f"{name}/"


def label_of(spec: ShardSpec, *, standby: bool) -> str | None:
    """Return a new actor name for a shard or its standby; None where nobody will look for it by
    name.
    """
    return (
        f"{spec.run_id}/{spec.layout_generation}.{spec.index}{'s' * standby}-{secrets.token_hex(4)}"
        if spec.name is not None
        else None
    )


def this_process() -> ProcessAddress:
    """Return this process's address, without a channel."""
    return ProcessAddress(
        ray.get_runtime_context().get_node_id(),
        pid=os.getpid(),
        born=process_start_time(os.getpid()),
    )


def register(run: str) -> ProcessAddress:
    """Record that this process belongs to an optimizer; return its address."""
    os.environ.setdefault(
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0"
    )  # threads of an asynchronous actor may block; Ray warns of them too
    address = this_process()
    internal_kv._internal_kv_put(_record(run, address), b"", namespace=NAMESPACE)
    return address


def actors_of(run: str) -> list[Any]:
    """Return the actors with names of this optimizer that Ray does not know to be dead."""
    found = []
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(run):
            with contextlib.suppress(ValueError):  # it has died since
                found.append(ray.get_actor(entry["name"], namespace=NAMESPACE))
    return found


def addresses_of(run: str) -> list[ProcessAddress]:
    """Return where processes of this optimizer run, or ran, unless `end` ended them."""
    return [
        ProcessAddress(node, pid=int(pid), born=born)
        for node, pid, born in (key.rsplit("/", 3)[1:] for key in _records(run))
    ]


def kill(addresses: Iterable[ProcessAddress], kill_on: KillOn, *, grace_s: float = 0.0) -> set[str]:
    """Kill processes, stopped ones too, and wait until they are gone.

    Args:
        addresses: the processes.
        kill_on: kills processes of other nodes.
        grace_s: seconds in which those that `ray.kill` reached may end by themselves.

    Returns:
        The nodes that did not answer.
    """
    node = ray.get_runtime_context().get_node_id()
    by_node: dict[str, list[tuple[int, str]]] = {}
    for address in addresses:
        by_node.setdefault(address.node, []).append((address.pid, address.born))
    own = by_node.pop(node, [])
    waits = {kill_on(other, processes, grace_s): other for other, processes in by_node.items()}
    end_processes(own, grace_s)
    silent = (
        ray.wait(list(waits), num_returns=len(waits), timeout=_END_S)[1] if waits else []
    )  # what is gone took its processes along
    return {waits[ref] for ref in silent}


def end(
    run: str, addresses: Iterable[ProcessAddress], kill_on: KillOn, *, grace_s: float = 0.0
) -> set[str]:
    """Kill processes as `kill` does, and delete their records."""
    ended = list(addresses)
    silent = kill(ended, kill_on, grace_s=grace_s)
    forget(run, ended)
    return silent


def forget(run: str, addresses: Sequence[ProcessAddress]) -> None:
    """Delete the records of processes that are gone."""
    for record in (
        key for key in _records(run) if any(key.endswith(_tail(address)) for address in addresses)
    ):
        internal_kv._internal_kv_del(record, namespace=NAMESPACE)


def kill_all(run: str, kill_on: KillOn, *, keep: Sequence[ProcessAddress] = ()) -> None:
    """End all processes whose names or records begin with `run`, except those to keep."""
    if not keep:
        for actor in actors_of(run):
            kill_actor(actor)
    kept = {_tail(address) for address in keep}
    end(
        run,
        [address for address in addresses_of(run) if _tail(address) not in kept],
        kill_on,
        grace_s=0.0 if keep else GRACE_S,
    )


def _record(run: str, address: ProcessAddress) -> str:
    return f"{run}{_tail(address)}"


def _tail(address: ProcessAddress) -> str:
    return f"/{address.node}/{address.pid}/{address.born}"


def _records(run: str) -> list[str]:
    return [key.decode() for key in internal_kv._internal_kv_list(run, namespace=NAMESPACE)]
