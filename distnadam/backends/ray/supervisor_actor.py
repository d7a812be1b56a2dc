"""The supervisor in a Ray actor: starts the shards' actors, and passes calls on."""

import asyncio
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.calls import retry_all_until_answered
from distnadam.backends.ray.cordon import Cordon
from distnadam.backends.ray.lease import lease_s
from distnadam.backends.ray.metrics_exporter import Exporter
from distnadam.backends.ray.nodes import node_facts
from distnadam.backends.ray.process_manager import OPEN_S, ActorFactory, RayProcessManager
from distnadam.backends.ray.relays import RelayProcess, Relays
from distnadam.backends.ray.stored_restore_points import StoredRestorePoints
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.metrics.meter import Sample, shard_bytes
from distnadam.planning.requests import shard_ask
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_events import Report
from distnadam.supervision.discovery import RecoveredTopology
from distnadam.supervision.events import ProcessDied
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.shard_map import ShardMap
from distnadam.supervision.supervisor import Supervisor
from distnadam.tensors.layout import Ranges


@dataclass(frozen=True, kw_only=True)
class SupervisorStatus:
    """What a supervisor knows of the optimizer's processes.

    Args:
        recoveries: how many shards were promoted, how often all went back, how many ranks left or
            were taken over.
        shard_recoveries: the first two of them.
        shards: where each shard runs, by index; without a node if it is missing.
        standbys: where the standbys run, filled or not, by the index of their shard.
    """

    recoveries: dict[str, int]
    shard_recoveries: int
    shards: dict[int, ProcessAddress]
    standbys: dict[int, ProcessAddress]


class SupervisorActor:
    """A `Supervisor` in an actor; its shards are this actor's children.

    A named one that Ray restarts finds them by their names.
    """

    def __init__(self, specs: Sequence[ShardSpec], replicas: int, factory: ActorFactory) -> None:
        context = ray.get_runtime_context()
        lasts_s = lease_s(specs[0].options.shard_timeout_s)
        self._processes = RayProcessManager(
            context.current_actor,
            specs[0].run_id,
            factory,
            self._died,
            lasts_s,
            Cordon(shard_ask(specs[0].options), specs[0].options.label_selector),
        )
        self._relays = Relays(
            partial(factory.make_relay, specs[0].name, specs[0].run_id),
            specs[0].run_id,
            factory.kill_on,
            specs[0].options.shard_timeout_s,
        )
        self._made: list[Any] = []
        self._exporter = Exporter.start(specs[0].name, specs[0].options)
        if self._exporter is not None:
            self._exporter.meter.sources.append(self._samples)
        self._opening = asyncio.Lock()
        self._opened = False
        with warnings.catch_warnings(
            category=DeprecationWarning, action="ignore"
        ):  # of Ray's, in Ray's own lines
            again = context.was_current_actor_reconstructed
        found = self._processes.discover(specs[0]) if again else None
        self._specs = specs if found is None else found.specs
        self._supervisor = Supervisor(
            self._specs, replicas, self._processes, memory=StoredRestorePoints.of(specs[0])
        )
        if found is not None:
            self._succeed(found)

    async def start(self) -> list[Any]:
        """Return the shards' new actors, which may not have started yet; idempotent."""
        self._made = self._made or [self._processes.make(spec) for spec in self._specs]
        return self._made

    async def open(self) -> ShardMap:
        """Have the shards get their memory and serve; return where they are. Idempotent.

        The first shard of each node makes the node's parameter memory, then the others join it.
        """
        async with self._opening:
            if not self._opened:
                await asyncio.to_thread(self._open)
                self._opened = True
        return await self.shard_map(0)

    def _open(self) -> None:
        actors = dict(enumerate(self._made))
        found = retry_all_until_answered(
            {i: actor.address.remote for i, actor in actors.items()}, timeout_s=OPEN_S
        )
        nodes = {i: address.node for i, address in found.items()}
        firsts = {node: min(i for i in nodes if nodes[i] == node) for node in nodes.values()}
        addresses = retry_all_until_answered(
            {i: partial(actors[i].open.remote, None) for i in firsts.values()}, timeout_s=OPEN_S
        )
        near = {node: addresses[i].socket for node, i in firsts.items()}
        addresses |= retry_all_until_answered(
            {
                i: partial(actor.open.remote, near[nodes[i]])
                for i, actor in actors.items()
                if i not in addresses
            },
            timeout_s=OPEN_S,
        )
        self._supervisor.manage(
            [ShardProcess(i, actors[i], addresses[i]) for i in sorted(actors)], {}
        )

    async def begin(self, checkpoint: CheckpointId | None, *initial: Any) -> None:
        """Start the watch.

        Args:
            checkpoint: that the shards were restored from.
            initial: the first parameters, one array per space in the order of their names.
        """
        spaces = sorted(self._specs[0].layout.sizes)
        flat = dict(zip(spaces, initial, strict=True)) if initial else None
        await asyncio.to_thread(lambda: self._supervisor.begin(initial=flat, checkpoint=checkpoint))

    async def shard_map(self, newer_than: int, *, suspect: bool = False) -> ShardMap:
        """Return the map once it is newer than that version; with `suspect`, after a look."""
        return await asyncio.wrap_future(self._supervisor.shard_map(newer_than, suspect))

    async def lease(self, who: str, lost: Sequence[ShardProcess]) -> bool | None:
        """Renew a shard's lease, as `LeaseManager.renew` does.

        Args:
            who: the shard's actor id.
            lost: standbys that the shard goes on without.
        """
        for standby in lost:
            self._supervisor.standby_is_stale(standby)
        return self._processes.fencing.leases.renew(who)

    async def notify(self, report: Report) -> None:
        """Take a report of a shard or a worker."""
        self._supervisor.notify(report)

    async def replacement_begun(self, what: str) -> int:
        """Remember that the state is about to be replaced from outside; return when."""
        return await asyncio.to_thread(self._supervisor.restore_points.replacement_begun, what)

    async def replacement_completed(self, begun: int) -> None:
        """Remember that all shards have what was replaced."""
        await asyncio.to_thread(self._supervisor.restore_points.replacement_completed, begun)

    async def snapshot_taken(self) -> int:
        """Return when the present state is taken, which all shards are held for."""
        return await asyncio.to_thread(self._supervisor.restore_points.snapshot_taken)

    async def checkpoint_written(
        self, checkpoint: CheckpointId, taken: int, *, is_whole: bool
    ) -> None:
        """Remember a checkpoint of a snapshot, and that it is whole."""
        written = self._supervisor.restore_points.checkpoint_written
        await asyncio.to_thread(written, checkpoint, taken, is_whole=is_whole)

    async def reshard(self, cuts: Sequence[Ranges]) -> None:
        """Have one shard per entry hold these ranges."""
        await asyncio.wrap_future(self._supervisor.reshard(cuts))

    async def lost_ranks(self) -> dict[int, int]:
        """Return the ranks whose worker died and is not replaced, and its incarnation."""
        return self._supervisor.cluster.lost_ranks

    async def about(self) -> dict[str, str]:
        """Return this process's node and versions."""
        return node_facts()

    async def status(self) -> SupervisorStatus:
        """Return where all processes are, and what was recovered from."""
        cluster = self._supervisor.cluster
        return SupervisorStatus(
            recoveries=self._supervisor.recoveries,
            shard_recoveries=self._supervisor.shard_recoveries,
            shards={process.index: process.address for process in list(cluster.shards)},
            standbys={index: process.address for index, process in dict(cluster.standbys).items()},
        )

    async def specs(self) -> list[ShardSpec]:
        """Return the shards' specs."""
        return list(self._supervisor.cluster.specs)

    async def relay(self, node: str, gone: ProcessAddress | None) -> RelayProcess:
        """Return the relay of a node, as `Relays.on` does."""
        return await self._relays.on(node, gone)

    async def linger(self) -> None:
        """Return after a while: a call that fails before is the end of the process."""
        await asyncio.sleep(self._specs[0].options.shard_timeout_s)

    async def close(self) -> None:
        """Stop watching, and end every process."""
        await self._relays.close()
        await asyncio.to_thread(self._supervisor.close)

    def _samples(self) -> Iterator[Sample]:
        sizes = [shard_bytes(spec) for spec in list(self._supervisor.cluster.specs)]
        yield "distnadam_recoveries_total", {}, sum(self._supervisor.recoveries.values())
        yield "distnadam_shard_imbalance", {}, max(sizes) * len(sizes) / max(1, sum(sizes))

    def _died(self, process: ShardProcess) -> None:
        self._supervisor.notify(ProcessDied(process=process))

    def _succeed(self, found: RecoveredTopology) -> None:
        """Supervise what was found; a missing shard counts as dead."""
        everyone = {
            i: found.shards.get(i) or ShardProcess(i, None, ProcessAddress(""))
            for i in range(len(found.specs))
        }
        self._made = [process.handle for process in everyone.values()]
        self._opened = True
        for process in (*everyone.values(), *found.standbys.values()):
            self._processes.fencing.inherit(process)
        self._supervisor.manage(
            list(everyone.values()),
            found.standbys,
            [process for i, process in everyone.items() if i not in found.shards],
        )
        threading.Thread(
            target=self._supervisor.begin, kwargs={"initial": None, "checkpoint": None}, daemon=True
        ).start()
