"""Real shards behind real sockets, and workers' ends, all in one process."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import (
    Describe,
    Description,
    Join,
    Push,
    RoundResult,
    ShardSpec,
)
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import Flat, cut_flat
from distnadam.tensors.layout import Layout
from distnadam.transport.shm_channel import ShmClient
from distnadam.transport.shm_server import ShmServer, parameter_arena
from distnadam.transport.unix_connection import Address

PARAMS: Flat = {"float32": np.linspace(-1, 1, 3000, dtype=np.float32)}
LAYOUT = Layout.of({"w": PARAMS["float32"]})
CUTS = LAYOUT.cuts(2)
ANSWER_S = 60.0


class Shard:
    """One shard with its server, as a process of a shard has them."""

    def __init__(
        self,
        index: int,
        neighbour: Address | None,
        *,
        at_once: bool = True,
        config: NadamConfig | None = None,
        can_send: Callable[[], bool] | None = None,
    ) -> None:
        self.spec = ShardSpec(
            index=index,
            num_shards=2,
            num_workers=2,
            replicas=0,
            name=None,
            config=config or NadamConfig(),
            options=Options(),
            layout=LAYOUT,
            ranges=CUTS[index],
        )
        self.arena = parameter_arena(self.spec, neighbour)
        first, second = (cut_flat(flat, self.spec.ranges) for flat in self.arena.flats)
        self.host = ShardHost(self.spec, buffers=(first, second), can_send=can_send)
        self.server = ShmServer(
            self.spec, self.arena, self.host.deliver, at_once=self.host if at_once else None
        )
        self.host.send(Load(epoch=1, params=cut_flat(PARAMS, self.spec.ranges))).result()

    def describe(self) -> Description:
        description: Description = self.host.send(Describe()).result()
        return description


class Shards:
    """Two shards of one machine."""

    def __init__(self, **given: Any) -> None:
        first = Shard(0, None, **given)
        self.all = [first, Shard(1, first.server.address, **given)]

    def close(self) -> None:
        for shard in self.all:
            shard.server.close()
            shard.host.close()

    def join(self, rank: int) -> int:
        incarnation: int = self.all[0].host.send(Join(rank=rank)).result().incarnation
        self.all[1].host.send(Join(rank=rank, incarnation=incarnation)).result()
        return incarnation

    def client(self, rank: int) -> "Client":
        client = Client(rank, self.join(rank))
        for index, shard in enumerate(self.all):
            client.shm.open(index, shard.server.address)
        return client

    def wait(self, fate: str) -> None:
        """Wait until rank 1 has that fate on both shards; the test's time limit bounds it."""
        while not all(1 in getattr(shard.describe(), fate) for shard in self.all):
            pass


class Client:
    """A worker with its end."""

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank, self.incarnation = rank, incarnation
        self.shm = ShmClient(LAYOUT.sizes, CUTS, rank, incarnation)

    def push(self, value: float, *, round: int = 1, dtype: str = "float32") -> int:
        whole = self.shm.gradients["float32"].view(np.dtype(dtype))[: PARAMS["float32"].size]
        whole[:] = value
        push = Push(
            epoch=1, rank=self.rank, incarnation=self.incarnation, round=round, gradients=None
        )
        return self.shm.post(
            {
                i: replace(push, gradients=cut_flat({"float32": whole}, c))
                for i, c in enumerate(CUTS)
            }
        )

    def collect(self, number: int, *, timeout_s: float = ANSWER_S) -> dict[int, RoundResult]:
        return self.shm.collect(number, 2, time.monotonic() + timeout_s)
