"""Plain classes made into Ray actors; the only module that says `ray.remote`.

Retries are never Ray's: a call that was lost is repeated by its sender and counted once by the shard's ledger. Ray restarts no actor but
a named optimizer's supervisor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distnadam.backends.cluster import NAMESPACE, actor_options, end_process
from distnadam.backends.shardactor import ShardActor
from distnadam.backends.supervisoractor import SupervisorActor, Tools
from distnadam.config import Options
from distnadam.messages import ShardSpec


class Member:
    """One rank of a team, whose methods are called by name."""

    def __init__(self, make: Callable[[int], Any], rank: int) -> None:
        self._member = make(rank)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the object."""
        return getattr(self._member, method)(*args)


_shard, _supervisor, _member = ray.remote(ShardActor), ray.remote(SupervisorActor), ray.remote(Member)
_end_process = ray.remote(end_process)


def make_shard(spec: ShardSpec, supervisor: Any, label: str | None, apart_from: str | None = None) -> Any:
    """Return a new actor for a shard or its standby, to be opened; on another node than that one, where there is another."""
    return _shard.options(**actor_options(spec, label, apart_from)).remote(spec, supervisor)


def end_on(node: str, pid: int, born: str) -> Any:
    """Have a process of another node killed; return a reference to wait for."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return _end_process.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(pid, born)


def make_supervisor(specs: Sequence[ShardSpec], replicas: int) -> Any:
    """Return a new supervisor.

    A named one outlives who made it, and is made again by Ray where it dies; an unnamed one ends with this process, so it lives beside it.
    """
    asked: dict[str, Any] = {"num_cpus": 0, "max_task_retries": 0}
    if specs[0].name is not None:
        asked |= {"name": specs[0].name, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1}
        asked["label_selector"] = dict(specs[0].options.label_selector)
    else:
        asked["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _supervisor.options(**asked).remote(specs, replicas, Tools(make_shard, end_on))


def make_member(make: Callable[[int], Any], rank: int, options: Options) -> Any:
    """Return a new actor for one rank of a team."""
    asked = {"num_cpus": options.worker_cpus, "label_selector": dict(options.worker_label_selector)}
    return _member.options(**asked, max_restarts=0, scheduling_strategy="SPREAD").remote(make, rank)
