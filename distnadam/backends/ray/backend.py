"""An optimizer's shards on a Ray cluster: started, ended, and found again by a name.

Ray is joined if it runs already or `RAY_ADDRESS` names it; else our own is started, and shut down
at close. Messages go by `RayShardTransport`, arrays by `RayWorkerChannel`.
"""

import logging
import resource
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError
from typing_extensions import override

from distnadam.backends.base import Backend, WorkerGroup
from distnadam.backends.ray import registry
from distnadam.backends.ray.actors import make_supervisor
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.cordon import chosen
from distnadam.backends.ray.joined import has_ray, require_ray, while_ray_lives
from distnadam.backends.ray.metrics_exporter import Exporter
from distnadam.backends.ray.names import end_optimizer, named
from distnadam.backends.ray.nodes import (
    UNDERSTOOD,
    await_start,
    check_versions,
    node_facts,
    nodes_in_words,
)
from distnadam.backends.ray.placement import (
    await_room,
    nodes_beside,
    shards_demand,
    workers_demand,
)
from distnadam.backends.ray.session import OwnedRay, connect_or_start
from distnadam.backends.ray.shard_transport import RayShardTransport
from distnadam.backends.ray.supervisor_client import RaySupervisorClient
from distnadam.backends.ray.worker_channel import REMEDY
from distnadam.backends.ray.worker_group import RayWorkerGroup
from distnadam.config import Options
from distnadam.errors import ClusterError, NameTaken, NotRunning, StepTimeout
from distnadam.metrics.meter import Meter
from distnadam.planning import descriptors, room
from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.shard_map import ShardMap
from distnadam.transport.link import carriers

log = logging.getLogger("distnadam")


class RayBackend(Backend):
    """One actor per shard, and a supervisor's.

    A pickled copy reaches the same actors from any process of the cluster. `run_id` names the
    processes that this object started, if any.
    """

    name = "ray"
    transport: RayShardTransport
    supervisor: RaySupervisorClient

    def __init__(
        self,
        supervisor: Any = None,
        name: str | None = None,
        shard_map: ShardMap | None = None,
        options: Options | None = None,
    ) -> None:
        self._own: OwnedRay | None = None
        self._sum_group = 1  # of an optimizer that this object started or found by its name
        self.run_id: str | None = None
        self._attach(supervisor, name, shard_map or ShardMap(0, ()), options or Options())

    def _attach(
        self, supervisor: Any, name: str | None, shard_map: ShardMap, options: Options
    ) -> None:
        """Reach the optimizer of that supervisor from now on."""
        self._name = name
        self._options = options
        self.supervisor = RaySupervisorClient(
            supervisor, name, retain_initial=options.retain_initial
        )
        self.transport = RayShardTransport(self.supervisor, shard_map, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return RayBackend, (
            self.supervisor.actor,
            self._name,
            self.transport.shard_map,
            self._options,
        )

    @property
    def actors(self) -> list[Any]:
        """The shards' actors, in order."""
        return self.transport.actors

    @property
    def addresses(self) -> list[ProcessAddress]:
        """Where the shards are, in order."""
        return self.transport.addresses

    @property
    @override
    def meter(self) -> Meter | None:
        return self._exporter.meter if self._exporter is not None else None

    @cached_property
    def _exporter(self) -> Exporter | None:
        require_ray()
        exporter = Exporter.start(self._name, self._options)
        if exporter is not None:  # a task that got this handle may never close it
            weakref.finalize(self, exporter.finish)
        return exporter

    @classmethod
    def connect(cls, name: str) -> tuple["RayBackend", ShardSpec]:
        """Return a backend of a running named optimizer, and the spec of its shard 0.

        Raises:
            VersionMismatch: it runs with another version of this package.
        """
        connect_or_start(None, start=False)
        supervisor = named(name)
        client = RaySupervisorClient(supervisor, name)
        check_versions([client.about()], node_facts(), UNDERSTOOD)
        spec = client.specs()[0]
        backend = cls(supervisor, name, options=spec.options)
        backend._sum_group = spec.config.sum_group
        try:
            backend.transport.refresh()
        except StepTimeout as error:
            raise StepTimeout(
                f"connecting to {name!r}: whoever builds it (`distnadam stop {name}` ends what is "
                f"left of it) did not start its shards: {error}"
            ) from error
        return backend, spec

    @classmethod
    def stop(cls, name: str) -> None:
        """End a running named optimizer, or what is left of one, from any process.

        Raises:
            NotRunning: no process of that name is left.
        """
        connect_or_start(None, start=False)
        run = registry.runs_of(name)
        try:
            supervisor = named(name)
        except NotRunning:
            if not registry.actors_of(run) and not registry.addresses_of(run):
                raise
            supervisor = None
        end_optimizer(supervisor, run)

    @override
    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        options, name = specs[0].options, specs[0].name
        self._sum_group = specs[0].config.sum_group
        self._attach(None, name, ShardMap(0, ()), options)
        counts = (specs[0].num_workers, len(specs), replicas)
        # the limit that Ray raises its own to, and that of a Ray started here
        descriptors.check("this host", resource.getrlimit(resource.RLIMIT_NOFILE)[1], *counts)
        self._own = connect_or_start(options)
        try:
            with while_ray_lives():
                Exporter.check(options)
                demand = shards_demand(options, len(specs) * (1 + replicas))
                await_room(demand, options.start_timeout_s, chosen)
                self._start(specs, replicas)
        except BaseException as error:
            self.close(destroy=True)
            if isinstance(error, ValueError) and "already" in str(error) and name is not None:
                raise NameTaken(
                    f"an optimizer named {name!r} is running on this cluster: connect to it, "
                    f"end it by `distnadam stop {name}`, or choose another name"
                ) from error
            if isinstance(error, RayError):
                # the last line of a traceback, the first of any other report
                line = -1 if isinstance(error, RayTaskError) else 0
                raise ClusterError(
                    f"the optimizer could not be started: {str(error).strip().splitlines()[line]}"
                ) from error
            raise
        if self._own is not None and name is not None:
            log.warning("%s", self._own.how_to_reach(name))
        nodes = ", ".join(f"{shard} on {host}" for shard, host in enumerate(self.hosts()))
        log.info("shards %s; by %s", nodes, carriers(options.transport, options.port_range))
        for reason in sorted({address.reason for address in self.addresses if address.reason}):
            log.warning("%s; %s", reason, REMEDY)

    def _start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """Start the supervisor's actor and the shards'."""
        run, options = registry.new_run(self._name), self._options
        actor = make_supervisor([replace(spec, run_id=run) for spec in specs], replicas)
        self.run_id = run  # from here on there is something to end
        self._attach(actor, self._name, ShardMap(0, ()), options)
        await_start([actor], options, who="the supervisor")
        shards = self.supervisor.start_shards()
        facts = await_start(shards, options)
        check_versions(facts, node_facts())
        counts = (specs[0].num_workers, len(specs), replicas)
        for each in facts:
            descriptors.check(f"node {each['node']}", int(each["descriptors"]), *counts)
        _check_memory(specs, facts, replicas)
        self.transport.shard_map = self.supervisor.open_shards()

    @override
    def hosts(self) -> list[str]:
        return nodes_in_words([address.node for address in self.addresses])

    @override
    def standbys(self) -> dict[int, str]:
        nodes = self.supervisor.standby_nodes()
        return dict(zip(nodes, nodes_in_words(nodes.values()), strict=True))

    @override
    def worker_group(
        self, size: int, make: Callable[..., Any], options: Options, given: tuple[Any, ...] = ()
    ) -> WorkerGroup:
        with while_ray_lives():
            shards = len(self.addresses) + len(self.standbys())
            demand = workers_demand(options, size, shards)
            await_room(demand, options.start_timeout_s, chosen)
        # as bytes: arrays that come through Ray's object store cannot be written
        make_rank = partial(_made, make, cloudpickle.dumps(given))
        return RayWorkerGroup(size, make_rank, options, self._sum_group)

    @override
    def close(self, *, destroy: bool) -> None:
        """Release the shards; with `destroy`, a handle that did not start them ends those of its
        name.
        """
        if destroy and self.supervisor.actor is not None and has_ray():
            end_optimizer(
                self.supervisor.actor,
                self.run_id or (registry.runs_of(self._name) if self._name else None),
            )
        self.supervisor.detach()
        if (exporter := self.__dict__.get("_exporter")) is not None:
            exporter.close()
        if self._own is not None:
            self._own.shut_down()
            self._own = None


def _check_memory(
    specs: Sequence[ShardSpec], facts: Sequence[Mapping[str, str]], replicas: int
) -> None:
    """Raise InsufficientResources if a node lacks the memory for the shards that started there, or
    all of them that for standbys and workers, which can go nowhere else.
    """
    left = {}
    for node in {each["node"]: None for each in facts}:
        here = [
            (spec, each) for spec, each in zip(specs, facts, strict=True) if each["node"] == node
        ]
        needs = [room.buffers(specs[0].layout), room.state([spec for spec, _ in here])]
        available = min(int(each["memory"]) for _, each in here)
        room.check(f"node {node}", available, needs)
        left[node] = available - sum(need.num_bytes for need in needs)
    others, suit = nodes_beside(facts, specs[0].options)
    needs = room.beside_shards(specs, standbys=replicas > 0 and not suit, workers=not others)
    room.check(f"beside their shards, node {', '.join(left)}", sum(left.values()), needs)


def _made(make: Callable[..., Any], given: bytes, rank: int) -> Any:
    """Return a rank's object, in its process, made of copies of what was given."""
    return make(rank, *cloudpickle.loads(given))
