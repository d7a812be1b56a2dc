"""A worker's channel to the shards of a Ray cluster: shared memory with the shards of its own node,
the transport's objects to all others. No Ray here.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from distnadam.backends.base import Pending, Routes, ShardTransport, WorkerChannel
from distnadam.backends.ray.address import ProcessAddress
from distnadam.errors import ArenaError, LaneError
from distnadam.protocol.messages import Push, RoundResult, TotalNorms
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Ranges
from distnadam.transport.shm_channel import ShmClient

log = logging.getLogger("distnadam")


_LOOK_EVERY_S = 1.0
"""Seconds between two looks, in a wait for answers, at whether anybody can still answer."""
REMEDY = (
    "Ray objects are used instead, which cost more time: give the node or container more "
    "memory, or run fewer workers on it"
)


@dataclass(frozen=True, kw_only=True)
class ChannelOwner:
    """The worker of a channel, and how the channel learns of the shards.

    Attributes:
        node: the worker's Ray node.
        rank: the worker's rank.
        sizes: elements of the whole model per space.
        addresses: returns where the shards are now; [] if memory is not to be shared.
    """

    node: str
    rank: int
    sizes: dict[str, int]
    addresses: Callable[[], list[ProcessAddress]]


class RayWorkerChannel(WorkerChannel):
    """Shared memory with the shards of the worker's node, Ray objects to all others.

    Args:
        transport: sends Ray objects.
        owner: the worker.
        ranges: what each shard holds.
        incarnation: the worker's incarnation.
    """

    def __init__(
        self,
        transport: ShardTransport,
        owner: ChannelOwner,
        ranges: list[Ranges],
        incarnation: int,
    ) -> None:
        self._transport = transport
        self._owner = owner
        self._ranges = ranges
        self._incarnation = incarnation
        self._shm: ShmClient | None = None
        self._gradients: Flat | None = None
        self._connected: list[ProcessAddress] = []
        self.reconnect(ranges, incarnation)

    @property
    @override
    def gradients(self) -> Flat:
        """Memory shared with shards if there is any at the first use, else this process's own."""
        if self._gradients is None:
            self._gradients = (
                empty_flat(self._owner.sizes) if self._shm is None else self._shm.gradients
            )
        return self._gradients

    @override
    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        """Share memory with each shard of this node; log which shards do, and why others do not."""
        addresses = self._owner.addresses()
        if ranges is not self._ranges or incarnation != self._incarnation:
            self._ranges = ranges
            self._incarnation = incarnation
            self._connected = []
            if self._shm is not None:
                self._shm.reset(ranges, incarnation)
        try:
            self._share_memory(addresses)
        except (ArenaError, LaneError) as error:
            log.warning("worker %d: %s; %s", self._owner.rank, error, REMEDY)
        self._connected = addresses
        shared = [shard for shard in range(len(ranges)) if self._shares_memory(shard)]
        others = [shard for shard in range(len(ranges)) if shard not in shared]
        log.info(
            "worker %d: shards %s by shared memory (same node), shards %s by Ray objects",
            self._owner.rank,
            shared or "none",
            others or "none",
        )
        self.routes = Routes(ranges, frozenset(shared))
        if not shared and self._gradients is None:
            self._shm = None
        self.parameters = None
        if self._shm is not None and self._shm.complete:
            first, second = self._shm.parameters
            self.parameters = (first, second)

    def _share_memory(self, addresses: list[ProcessAddress]) -> None:
        """Open a channel to each shard of this node that moved or has none.

        Raises:
            ArenaError, LaneError: one could not be opened.
        """
        changed = [
            shard
            for shard, address in enumerate(addresses)
            if self._connected[shard : shard + 1] != [address] or not self._shares_memory(shard)
        ]
        near = {
            shard: socket
            for shard in changed
            if addresses[shard].node == self._owner.node
            and (socket := addresses[shard].socket) is not None
        }
        if near and self._shm is None and self._gradients is None:
            self._shm = ShmClient(
                self._owner.sizes, self._ranges, self._owner.rank, self._incarnation
            )
        if self._shm is None:
            return
        for shard in changed:
            self._shm.drop(shard)
        for shard, socket in near.items():
            self._shm.open(shard, socket)

    def _shares_memory(self, shard: int) -> bool:
        return self._shm is not None and shard in self._shm

    @override
    def post(self, messages: Mapping[int, Push] | Mapping[int, TotalNorms]) -> Pending:
        if self._shm is None:
            return self._transport.post(messages)
        self._transport.require_open()
        near = {i: message for i, message in messages.items() if i in self._shm}
        far = {i: message for i, message in messages.items() if i not in near}
        number = self._shm.post(near) if near else 0
        objects = self._transport.post(far) if far else None
        return RayChannelPending(self._shm, number, near, objects, self._transport.require_open)

    @override
    def close(self) -> None:
        if self._shm is not None:
            self._shm.close()


class RayChannelPending(Pending):
    """Answers over shared memory and as Ray objects.

    Args:
        shm: has the answers of the shards that share memory.
        number: `shm`'s number of the messages.
        near: the messages over shared memory, by shard.
        objects: the other shards' answers; None if there are none.
        require_open: raises if no answer can come any more.
    """

    def __init__(
        self,
        shm: ShmClient,
        number: int,
        near: Mapping[int, Push | TotalNorms],
        objects: Pending | None,
        require_open: Callable[[], None],
    ) -> None:
        self._shm = shm
        self._number = number
        self._near = near
        self._objects = objects
        self._require_open = require_open

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        answers = self._collect(deadline) if self._near else {}
        if self._objects is not None:
            for shard, message in self._near.items():
                answer = answers[shard]
                if isinstance(answer, RoundResult) and message.want_parameters:
                    answers[shard] = replace(
                        answer, parameters=self._shm.parameters_of(shard, answer)
                    )
            answers = answers | self._objects.result(max(0.0, deadline - time.monotonic()))
        return answers

    def _collect(self, deadline: float) -> dict[int, Any]:
        while True:
            look_at = time.monotonic() + _LOOK_EVERY_S
            try:
                return self._shm.collect(self._number, len(self._near), min(look_at, deadline))
            except TimeoutError:
                if look_at >= deadline:
                    raise
                self._require_open()
