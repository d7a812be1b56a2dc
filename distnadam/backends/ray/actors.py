"""Plain classes made into Ray actors; the only module that says `ray.remote`.

Retries are never Ray's: a call that was lost is repeated by its sender and counted once by the
shard's ledger. Ray restarts no actor but a named optimizer's supervisor.
"""

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distnadam.backends.ray import placement, registry
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.nodes import NAMESPACE
from distnadam.backends.ray.process_manager import ActorFactory
from distnadam.backends.ray.processes import end_processes, process_start_time
from distnadam.backends.ray.shard_actor import ShardActor
from distnadam.backends.ray.supervisor_actor import SupervisorActor
from distnadam.config import Options
from distnadam.protocol.messages import ShardSpec


class RankActor:
    """One rank of a team, whose methods are called by name."""

    def __init__(self, make: Callable[[int], Any], rank: int) -> None:
        self._member = make(rank)

    def about(self) -> ProcessAddress:
        """Return this process."""
        return registry.here()

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the object."""
        return getattr(self._member, method)(*args)


_shard, _supervisor, _member = (
    ray.remote(ShardActor),
    ray.remote(SupervisorActor),
    ray.remote(RankActor),
)
_end_processes, _process_born = ray.remote(end_processes), ray.remote(process_start_time)


def make_shard(
    spec: ShardSpec,
    supervisor: Any,
    label: str | None,
    silent: Collection[str],
    apart_from: Collection[str],
) -> Any:
    """Return a new actor for a shard or its standby, to be opened; on another node than those,
    where there is another.
    """
    return _shard.options(**_actor_options(spec, label, silent, apart_from)).remote(
        spec, supervisor
    )


def kill_on(node: str, processes: Sequence[tuple[int, str]], grace_s: float) -> Any:
    """Have processes of another node killed; return a reference to wait for."""
    return _end_processes.options(**_there(node)).remote(processes, grace_s)


def start_time_on(node: str, pid: int) -> Any:
    """Return a reference to when a process of another node was born, "" where there is none."""
    return _process_born.options(**_there(node)).remote(pid)


def make_supervisor(specs: Sequence[ShardSpec], replicas: int) -> Any:
    """Return a new supervisor.

    A named one outlives who made it, and is made again by Ray where it dies; an unnamed one ends
    with this process, so it lives beside it.
    """
    asked: dict[str, Any] = {"num_cpus": 0, "max_task_retries": 0}
    if specs[0].name is not None:
        asked |= {
            "name": specs[0].name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
        }
        asked |= placement.at(
            len(specs), ray.nodes(), {}, specs[0].options.label_selector, first=_first(specs[0])
        )
    else:
        asked["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
    return _supervisor.options(**asked).remote(
        specs, replicas, ActorFactory(make_shard, kill_on, start_time_on)
    )


def _there(node: str) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        "max_retries": 0,
    }


def make_member(
    make: Callable[[int], Any], rank: int, options: Options, first: int, silent: Collection[str]
) -> Any:
    """Return a new actor for one rank of a team, whose ranks take the nodes in turn from the first
    on.
    """
    ask, selector = {"CPU": options.worker_cpus}, options.worker_label_selector
    asked = placement.at(rank, ray.nodes(), ask, selector, first=first, silent=silent)
    return _member.options(**asked, num_cpus=options.worker_cpus, max_restarts=0).remote(make, rank)


def _first(spec: ShardSpec) -> int:
    """Return with which node to begin: another one for each optimizer."""
    return zlib.crc32(spec.run_id.encode())


def _actor_options(
    spec: ShardSpec, label: str | None, silent: Collection[str], apart_from: Collection[str]
) -> dict[str, Any]:
    """Return what a shard's actor asks of Ray; one with a label is found by it, and outlives who
    made it.
    """
    options = spec.options
    asked: dict[str, Any] = {
        "num_cpus": options.shard_cpus,
        "resources": dict(options.shard_resources),
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    about: dict[str, Any] = {
        "first": _first(spec),
        "spread": options.spread,
        "silent": silent,
        "apart_from": apart_from,
    }
    asked |= placement.at(
        spec.index, ray.nodes(), placement.shard_ask(options), options.label_selector, **about
    )
    if options.shard_memory_bytes:
        asked["memory"] = options.shard_memory_bytes
    if label is not None:
        asked |= {"name": label, "namespace": NAMESPACE, "lifetime": "detached"}
    return asked
