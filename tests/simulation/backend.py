"""The backend of a simulated `World`: a caller that waits has the shards work instead."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from typing_extensions import override

from distnadam.backends.base import (
    Backend,
    Pending,
    ShardTransport,
    SupervisorClient,
    WorkerChannel,
    WorkerGroup,
)
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options
from distnadam.errors import DistNadamError, LifecycleError, Reconfigured
from distnadam.hyperparameters import NadamConfig
from distnadam.metrics.meter import Meter
from distnadam.protocol.messages import ShardSpec, Step, StepNorms
from distnadam.protocol.supervisor_events import CannotComplete
from distnadam.supervision.shard_map import require_alive
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from tests.simulation.world import Process, World


class _WorldPending(Pending):
    def __init__(self, world: World, futures: dict[int, Future[Any]]) -> None:
        self._world = world
        self._futures = futures

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        while True:
            for future in self._futures.values():
                if future.done() and (error := future.exception()) is not None:
                    raise error
            if all(future.done() for future in self._futures.values()):
                return {index: future.result() for index, future in self._futures.items()}
            if not self._world.work() and not self._world.release_held():
                raise TimeoutError


class _WorldChannel(WorkerChannel):
    def __init__(
        self, transport: "_WorldTransport", layout: Layout, rank: int, incarnation: int
    ) -> None:
        self._transport = transport
        self._known = (rank, incarnation)
        self._gradients = empty_flat(layout.sizes)
        transport.world.memories[self._known] = self._gradients
        transport.world.connected[rank] = incarnation

    @property
    @override
    def gradients(self) -> Flat:
        return self._gradients

    @override
    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        memories, known = self._transport.world.memories, self._known
        memories[known[0], incarnation] = memories.pop(known)
        self._known = known[0], incarnation
        self._transport.world.connected[known[0]] = incarnation

    @override
    def post(self, messages: Mapping[int, Any]) -> Pending:
        world, shards = self._transport.world, self._transport.shard_map.shards
        return _WorldPending(
            world,
            {
                index: world.transmit(shards[index].handle, message)
                for index, message in messages.items()
            },
        )

    @override
    def close(self) -> None:
        pass


class _WorldTransport(ShardTransport):
    """Messages to a world's shards; each copy has its own idea of where they are."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.closed = False
        self.shard_map = world.supervisor.newest_map

    @property
    @override
    def cuts(self) -> Sequence[Ranges]:
        return self.shard_map.cuts

    @property
    @override
    def version(self) -> int:
        return self.shard_map.version

    @override
    def post(self, messages: Mapping[int, Any]) -> Pending:
        self.require_open()
        shards = self.shard_map.shards
        if any(index >= len(shards) for index in messages):
            raise Reconfigured(f"there are {len(shards)} shards now; look again")
        self.world.work()
        return _WorldPending(
            self.world, {i: self._send(shards[i].handle, m) for i, m in messages.items()}
        )

    def _send(self, process: Process, message: Any) -> Future[Any]:
        return (
            self.world.transmit(process, message)
            if isinstance(message, (Step, StepNorms))
            else process.send(message)
        )

    @override
    def open_channel(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        return _WorldChannel(self, layout, rank, incarnation)

    @override
    def refresh(self) -> None:
        self.shard_map = require_alive(self.world.supervisor.newest_map)

    @override
    def await_recovery(self, timeout_s: float) -> None:
        self.world.count_wait()
        self.world.look()
        self.refresh()

    @override
    def wait_if_moved(self, version: int) -> bool:
        self.await_recovery(0)
        return self.shard_map.version > version

    @override
    def require_open(self) -> None:
        if self.closed:
            raise LifecycleError("the optimizer was closed in this client")

    @override
    def new_token(self) -> str:
        return secrets.token_hex(8)


class _WorldSupervisorClient(SupervisorClient):
    def __init__(self, world: World) -> None:
        self._world = world

    @override
    def started(self, *, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        self._world.supervisor.resync(initial=initial, checkpoint=checkpoint)

    @override
    def report_cannot_complete(self) -> None:
        self._world.supervisor.notify(CannotComplete())

    @override
    def replacement_begun(self, what: str) -> int:
        return self._world.supervisor.restore_points.replacement_begun(what)

    @override
    def replacement_completed(self, begun: int) -> None:
        self._world.supervisor.restore_points.replacement_completed(begun)

    @override
    def snapshot_taken(self) -> int:
        return self._world.supervisor.restore_points.snapshot_taken()

    @override
    def checkpoint_written(self, checkpoint: CheckpointId, taken: int, *, is_whole: bool) -> None:
        points = self._world.supervisor.restore_points
        points.checkpoint_written(checkpoint, taken, is_whole=is_whole)

    @override
    def lost_ranks(self) -> dict[int, int]:
        return self._world.supervisor.cluster.lost_ranks

    @override
    def shard_recoveries(self) -> int:
        return self._world.supervisor.shard_recoveries

    @override
    def reshard(self, cuts: Sequence[Ranges]) -> None:
        done = self._world.supervisor.reshard(cuts)
        self._world.look()
        done.result()


class WorldBackend(Backend):
    """The seam to a world's shards, which the world has started already."""

    name = "world"
    transport: _WorldTransport

    def __init__(self, world: World) -> None:
        self.transport = _WorldTransport(world)
        self.supervisor = _WorldSupervisorClient(world)

    @property
    @override
    def meter(self) -> Meter | None:
        return None

    @override
    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        pass

    @override
    def hosts(self) -> list[str]:
        return ["this world"] * len(self.transport.cuts)

    @override
    def standbys(self) -> dict[int, str]:
        return dict.fromkeys(self.transport.world.standbys, "this world")

    @override
    def worker_group(
        self, size: int, make: Callable[..., Any], options: Options, given: tuple[Any, ...] = ()
    ) -> WorkerGroup:
        raise DistNadamError("a simulated world has no worker groups")

    @override
    def close(self, *, destroy: bool) -> None:
        self.transport.closed = True
        if destroy:
            for process in self.transport.world.shards:
                process.kill()


def begin_world(
    initial: Any,
    config: NadamConfig,
    options: Options,
    num_shards: int,
    num_workers: int,
    replicas: int,
    *,
    objects: bool = False,
    hosts: int = 1,
    per_host: int = 1,
    cut: int = 0,
) -> tuple[World, Layout]:
    """Return a world whose shards hold one tensor `w` of float32, or the first `cut` elements as
    another, `a`.
    """
    tree = {"a": initial[:cut], "w": initial[cut:]} if cut else {"w": initial}
    may_lack = config.clocks == "tensor"
    layout = Layout.of(tree).for_workers(config.pull_dtype, may_lack=may_lack)
    cuts = layout.cuts(num_shards)
    specs = [
        ShardSpec(
            index=i,
            num_shards=num_shards,
            num_workers=num_workers,
            replicas=replicas,
            name=None,
            config=config,
            options=options,
            layout=layout,
            ranges=cut,
        )
        for i, cut in enumerate(cuts)
    ]
    world = World(specs, replicas=replicas, objects=objects, hosts=hosts, per_host=per_host)
    ShardGroup(WorldBackend(world), layout, options).load({"float32": initial})
    world.look()
    return world, layout
