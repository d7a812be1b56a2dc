"""The supervisor as it lives in a Ray actor."""

import asyncio
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.calls import all_answered
from distnadam.backends.ray.lease import lease_s
from distnadam.backends.ray.metrics_exporter import Exporter
from distnadam.backends.ray.nodes import node_facts
from distnadam.backends.ray.process_manager import OPEN_S, ActorFactory, RayProcessManager
from distnadam.metrics.meter import Sample, shard_bytes
from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.discovery import RecoveredTopology
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.shard_map import ShardMap
from distnadam.supervision.supervisor import Supervisor
from distnadam.tensors.layout import Ranges


class SupervisorActor:
    """A `Supervisor`, its shards being this actor's children; a named one, made again by Ray, finds
    them by their names.
    """

    def __init__(self, specs: Sequence[ShardSpec], replicas: int, factory: ActorFactory) -> None:
        context = ray.get_runtime_context()
        lasts_s = lease_s(specs[0].options.shard_timeout_s)
        self._processes = RayProcessManager(
            context.current_actor, specs[0].run_id, factory, self._died, lasts_s
        )
        self._made: list[Any] = []
        self._exporter = Exporter.start(specs[0].name, specs[0].options)
        if self._exporter is not None:
            self._exporter.meter.sources.append(self._samples)
        self._opening, self._opened = asyncio.Lock(), False
        with warnings.catch_warnings(
            category=DeprecationWarning, action="ignore"
        ):  # of Ray's, in Ray's own lines
            again = context.was_current_actor_reconstructed
        found = self._processes.discover(specs[0]) if again else None
        self._specs = specs if found is None else found.specs
        self._supervisor = Supervisor(self._specs, replicas, self._processes)
        if found is not None:
            self._succeed(found)

    async def start(self) -> list[Any]:
        """Make the shards' actors, which may not have started yet, and return them; asked again,
        return the same.
        """
        self._made = self._made or [self._processes.make(spec) for spec in self._specs]
        return self._made

    async def open(self) -> ShardMap:
        """Have the first shard of each node make the node's parameter memory, then the others join
        it; asked again, say where they are.
        """
        async with self._opening:
            if not self._opened:
                await asyncio.to_thread(self._open)
                self._opened = True
        return await self.shard_map(0)

    def _open(self) -> None:
        actors = dict(enumerate(self._made))
        nodes = {
            i: place.node
            for i, place in all_answered(
                actors, lambda i: actors[i].place.remote(), timeout_s=OPEN_S
            ).items()
        }
        firsts = {node: min(i for i in nodes if nodes[i] == node) for node in nodes.values()}
        places = all_answered(
            firsts.values(), lambda i: actors[i].open.remote(None), timeout_s=OPEN_S
        )
        near = {node: places[i].address for node, i in firsts.items()}
        places |= all_answered(
            actors.keys() - places.keys(),
            lambda i: actors[i].open.remote(near[nodes[i]]),
            timeout_s=OPEN_S,
        )
        self._supervisor.adopt([ShardProcess(i, actors[i], places[i]) for i in sorted(actors)], {})

    async def begin(self, directory: str | None, *initial: Any) -> None:
        """Start the watch; `initial` are the first parameters by space, in the order of their
        names.
        """
        spaces = sorted(self._specs[0].layout.sizes)
        flat = dict(zip(spaces, initial, strict=True)) if initial else None
        await asyncio.to_thread(lambda: self._supervisor.begin(initial=flat, directory=directory))

    async def shard_map(self, newer_than: int, *, suspect: bool = False) -> ShardMap:
        """See `Supervisor.shard_map`."""
        return await asyncio.wrap_future(self._supervisor.shard_map(newer_than, suspect))

    async def leave(self, who: str, lost: ShardProcess | None) -> bool | None:
        """Give a shard leave, as `Leases.ask` has it; `lost` is a standby on another node that it
        has gone on without.
        """
        if lost is not None:
            self._supervisor.outdated(lost)
        return self._processes.fencing.leases.ask(who)

    async def notice(self, what: str, rank: int, incarnation: int) -> None:
        """See `Supervisor.notice`."""
        self._supervisor.notice(what, rank, incarnation)

    async def changing(self, what: str) -> None:
        """See `Supervisor.changing`."""
        self._supervisor.changing(what)

    async def changes(self) -> int:
        """See `Supervisor.changes`."""
        return self._supervisor.changes()

    async def saved(self, root: str, changes: int) -> None:
        """See `Supervisor.saved`."""
        self._supervisor.saved(root, changes)

    async def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """See `Supervisor.reshard`."""
        await asyncio.wrap_future(self._supervisor.reshard(num_shards, cuts))

    async def lost_ranks(self) -> dict[int, int]:
        """See `Supervisor.lost_ranks`."""
        return self._supervisor.lost_ranks()

    async def about(self) -> dict[str, Any]:
        """Return what `node_facts` says here, what was recovered from, and by its shard's index the
        node of each standby.
        """
        return {
            **node_facts(),
            **self._supervisor.recoveries(),
            "standbys": {i: p.node for i, p in self._supervisor.standbys().items()},
        }

    async def specs(self) -> Sequence[ShardSpec]:
        """Return the shards' specs."""
        return self._supervisor.specs()

    async def close(self) -> None:
        """See `Supervisor.close`."""
        await asyncio.to_thread(self._supervisor.close)

    def _samples(self) -> Iterator[Sample]:
        sizes = [shard_bytes(spec.ranges) for spec in self._supervisor.specs()]
        yield "distnadam_recoveries_total", {}, sum(self._supervisor.recoveries().values())
        yield "distnadam_shard_imbalance", {}, max(sizes) * len(sizes) / max(1, sum(sizes))

    def _died(self, process: ShardProcess) -> None:
        self._supervisor.died(process)

    def _succeed(self, found: RecoveredTopology) -> None:
        """Take over what was found; what is missing counts as dead."""
        everyone = {
            i: found.shards.get(i) or ShardProcess(i, None, ProcessAddress(""))
            for i in range(len(found.specs))
        }
        self._made, self._opened = [process.handle for process in everyone.values()], True
        for process in (*everyone.values(), *found.standbys.values()):
            self._processes.fencing.inherit(process)
        self._supervisor.adopt(
            list(everyone.values()),
            found.standbys,
            [process for i, process in everyone.items() if i not in found.shards],
        )
        threading.Thread(
            target=self._supervisor.begin, kwargs={"initial": None, "directory": None}, daemon=True
        ).start()
