"""The seam of the package to a `World` of the tests: nobody waits, whoever would has the shards
work instead.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from distnadam.backends.base import Backend, Pending, WorkerChannel, WorkerGroup
from distnadam.client.shard_group import ShardGroup
from distnadam.config import NadamConfig, Options
from distnadam.errors import DistNadamError
from distnadam.protocol.messages import ShardSpec, Step, StepNorms
from distnadam.supervision.shard_map import require_alive
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from tests.simulation.world import LIVELOCK, Process, World


class _WorldPending(Pending):
    def __init__(self, world: World, futures: dict[int, Future[Any]]) -> None:
        self._world, self._futures = world, futures

    def result(self, timeout_s: float) -> dict[int, Any]:
        while True:
            for future in self._futures.values():
                if future.done() and (error := future.exception()) is not None:
                    raise error
            if all(future.done() for future in self._futures.values()):
                return {index: future.result() for index, future in self._futures.items()}
            if not self._world.work():
                raise TimeoutError


class _WorldLink(WorkerChannel):
    def __init__(
        self, backend: "WorldBackend", layout: Layout, rank: int, incarnation: int
    ) -> None:
        self._backend, self.gradients, self.parameters, world = (
            backend,
            empty_flat(layout.sizes),
            None,
            backend.world,
        )
        world.memories[rank, incarnation], self._known = self.gradients, (rank, incarnation)

    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        memories, known = self._backend.world.memories, self._known
        memories[known[0], incarnation] = memories.pop(known)
        self._known = known[0], incarnation

    def post(self, messages: Mapping[int, Any]) -> Pending:
        world, shards = self._backend.world, self._backend._shard_map.shards
        return _WorldPending(
            world,
            {
                index: world.transmit(shards[index].handle, message)
                for index, message in messages.items()
            },
        )

    def close(self) -> None:
        pass


class WorldBackend(Backend):
    """The seam to a world's shards; each copy has its own idea of where they are."""

    name = "world"

    def __init__(self, world: World) -> None:
        self.world = world
        self._shard_map = world.supervisor._publisher.now

    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        pass

    def began(self, *, initial: Flat | None, directory: str | None) -> None:
        self.world.supervisor._source.begin(initial, directory)

    def await_recovery(self, timeout_s: float) -> None:
        self.world._posts += 1
        assert self.world._posts < LIVELOCK
        self.world.look()
        self._shard_map = require_alive(self.world.supervisor._publisher.now)

    def refresh(self) -> None:
        self._shard_map = require_alive(self.world.supervisor._publisher.now)

    @property
    def num_shards(self) -> int:
        return len(self._shard_map.shards)

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        done = self.world.supervisor.reshard(num_shards, cuts)
        self.world.look()
        done.result()
        self.refresh()

    @property
    def version(self) -> int:
        return self._shard_map.version

    def wait_if_moved(self, version: int) -> bool:
        self.await_recovery(0)
        return self._shard_map.version > version

    def report_cannot_complete(self) -> None:
        self.world.supervisor.notice("stuck", -1, 0)

    def changes(self) -> int:
        return self.world.supervisor.changes()

    def saved(self, root: str, changes: int) -> None:
        self.world.supervisor.saved(root, changes)

    def changing(self, what: str) -> None:
        self.world.supervisor.changing(what)

    def post(self, messages: Mapping[int, Any]) -> Pending:
        self.world.work()
        return _WorldPending(
            self.world,
            {i: self._send(self._shard_map.shards[i].handle, m) for i, m in messages.items()},
        )

    def _send(self, process: Process, message: Any) -> Future[Any]:
        return (
            self.world.transmit(process, message)
            if isinstance(message, (Step, StepNorms))
            else process.send(message)
        )

    def link(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        return _WorldLink(self, layout, rank, incarnation)

    def team(self, size: int, make: Callable[[int], Any], options: Options) -> WorkerGroup:
        raise DistNadamError("there are no teams here")

    def close(self, *, destroy: bool) -> None:
        pass


def begin_world(
    initial: Any,
    config: NadamConfig,
    options: Options,
    num_shards: int,
    num_workers: int,
    replicas: int,
    *,
    objects: bool = False,
) -> tuple[World, Layout]:
    """Return a world whose shards hold one tensor `w` of float32."""
    layout = Layout.of({"w": initial})
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
    world = World(specs, replicas=replicas, objects=objects)
    ShardGroup(WorldBackend(world), layout, num_shards, options).load({"float32": initial})
    world.look()
    return world, layout
