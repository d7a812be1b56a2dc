"""Plain classes made into Ray actors; the only module that says `ray.remote`.

Ray retries no call: a sender repeats a lost one, and the shard's ledger counts it once. Ray
restarts no actor but a named optimizer's supervisor.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distnadam.backends.ray import registry
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.nodes import NAMESPACE
from distnadam.backends.ray.output import PREFIX, PROBE, RELAY, SHARD, SUPERVISOR, WORKER
from distnadam.backends.ray.placement import Avoid, Placement, placement_options
from distnadam.backends.ray.process_manager import ActorFactory
from distnadam.backends.ray.processes import end_processes, process_start_time
from distnadam.backends.ray.relay_actor import RelayActor
from distnadam.backends.ray.shard_actor import ShardActor
from distnadam.backends.ray.supervisor_actor import SupervisorActor
from distnadam.config import Options
from distnadam.planning.requests import shard_ask, worker_ask
from distnadam.protocol.messages import ShardSpec


class RankActor:
    """One rank of a team, whose methods are called by name."""

    def __init__(self, make: Callable[[int], Any], rank: int) -> None:
        self._member = make(rank)

    def about(self) -> ProcessAddress:
        """Return this process."""
        return registry.this_process()

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the object."""
        return getattr(self._member, method)(*args)


_end_processes = ray.remote(end_processes)
_process_start_time = ray.remote(process_start_time)


@lru_cache(maxsize=256)  # Ray keeps every class that a process gives it, some 150 KiB each
def _titled(actor: type, *title: object) -> Any:
    """Return an actor's class of this name, by which Ray calls its process and what it prints."""
    name = " ".join([PREFIX, *filter(None, map(str, title))])
    return ray.remote(type(name, (actor,), {"__module__": __name__, "__doc__": actor.__doc__}))


def make_shard(
    spec: ShardSpec,
    supervisor: Any,
    label: str | None,
    avoid: Avoid,
    on: str | None,
) -> Any:
    """Return a new actor for a shard or its standby, to be opened; on that node, if it can be."""
    title = _titled(ShardActor, spec.name or "", SHARD, spec.index)
    return title.options(**_actor_options(spec, label, avoid, on)).remote(spec, supervisor)


def make_relay(name: str | None, run: str, node: str) -> Any:
    """Return a new actor for the relay of a node; it ends with the process that made it."""
    return _on_node(_titled(RelayActor, name or "", RELAY), node, run)


def make_probe(actor: type, node: str, *args: Any) -> Any:
    """Return a new actor of that class on a node, to examine it."""
    return _on_node(_titled(actor, PROBE), node, *args)


def _on_node(titled: Any, node: str, *args: Any) -> Any:
    """Return a new actor on a node; if that is gone, calls of it fail."""
    placed = titled.options(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        max_restarts=0,
        max_task_retries=0,
    )
    return placed.remote(*args)


def kill_on(node: str, processes: Sequence[tuple[int, str]], grace_s: float) -> Any:
    """Kill processes of another node; return a reference to wait for."""
    return _end_processes.options(**_there(node)).remote(processes, grace_s)


def start_time_on(node: str, pid: int) -> Any:
    """Return a reference to the start time of a process of another node, "" if it is gone."""
    return _process_start_time.options(**_there(node)).remote(pid)


def make_supervisor(specs: Sequence[ShardSpec], replicas: int) -> Any:
    """Return a new supervisor.

    Ray restarts a named one if it dies, and unless its options say otherwise it outlives this
    process; an unnamed one ends with this process, so it is placed on this node.
    """
    asked: dict[str, Any] = {"num_cpus": 0, "max_task_retries": 0}
    if specs[0].name is not None:
        asked |= {
            "name": specs[0].name,
            "namespace": NAMESPACE,
            "lifetime": "detached" if specs[0].options.outlives else "non_detached",
            "max_restarts": -1,
        }
        beside_shards = Placement(
            index=len(specs),
            ask={},
            selector=specs[0].options.label_selector,
            first=_first(specs[0]),
        )
        asked |= placement_options(beside_shards, ray.nodes())
    else:
        asked["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
    return (
        _titled(SupervisorActor, specs[0].name or "", SUPERVISOR)
        .options(**asked)
        .remote(specs, replicas, ActorFactory(make_shard, make_relay, kill_on, start_time_on))
    )


def _there(node: str) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        "max_retries": 0,
    }


def make_member(
    make: Callable[[int], Any],
    rank: int,
    options: Options,
    place: int,
    avoid: Avoid,
) -> Any:
    """Return a new actor for one rank of a team.

    Args:
        make: makes the rank's object, in the actor.
        rank: the rank.
        options: say what it asks of Ray.
        place: among the nodes in turn, for one that asks for no resource.
        avoid: nodes that it is not to go to.
    """
    wanted = Placement(
        index=0,
        ask=worker_ask(options),
        selector=options.worker_label_selector,
        first=place,
        avoid=avoid,
    )
    asked = placement_options(wanted, ray.nodes())
    return (
        _titled(RankActor, WORKER, rank)
        .options(
            **asked,
            num_cpus=options.worker_cpus,
            num_gpus=options.worker_gpus or None,
            max_restarts=0,
        )
        .remote(make, rank)
    )


def _first(spec: ShardSpec) -> int:
    """Return the position of the first shard's node: another one for each optimizer."""
    return zlib.crc32(spec.run_id.encode())


def _actor_options(
    spec: ShardSpec, label: str | None, avoid: Avoid, on: str | None
) -> dict[str, Any]:
    """Return a shard's actor options; one with a label is found by it, and outlives its maker."""
    options = spec.options
    asked: dict[str, Any] = {
        "num_cpus": options.shard_cpus,
        "resources": dict(options.shard_resources),
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    wanted = Placement(
        index=spec.index,
        ask=shard_ask(options),
        selector=options.label_selector,
        first=_first(spec),
        spread=options.spread,
        avoid=avoid,
        on=on,
    )
    asked |= placement_options(wanted, ray.nodes())
    if options.shard_memory_bytes:
        asked["memory"] = options.shard_memory_bytes
    if label is not None:
        asked |= {"name": label, "namespace": NAMESPACE, "lifetime": "detached"}
    return asked
