"""A worker's way to the shards of a Ray cluster: lanes to those of its own node, the backend's
objects to all others. No Ray here.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from distnadam.backends.base import Pending, Routes, ShardTransport, WorkerChannel
from distnadam.backends.ray.address import ProcessAddress
from distnadam.errors import ArenaError, LaneError
from distnadam.protocol.messages import Push, RoundResult, TotalNorms
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from distnadam.transport.shm_channel import ShmClient

log = logging.getLogger("distnadam")


REMEDY = (
    "Ray objects are used instead, which cost more time: give the node or container more "
    "memory, or run fewer workers on it"
)


class RayWorkerChannel(WorkerChannel):
    """Lanes to the shards of this worker's node, Ray objects to all others.

    Args:
        transport: sends Ray objects.
        places_now: returns where the shards are, none where no lanes are wanted.
        layout: the model's.
        ranges: what each shard holds.
        node: this process's Ray node.
        rank: the worker's rank.
        incarnation: the worker's incarnation.
    """

    def __init__(
        self,
        transport: ShardTransport,
        places_now: Callable[[], list[ProcessAddress]],
        layout: Layout,
        ranges: list[Ranges],
        node: str,
        rank: int,
        incarnation: int,
    ) -> None:
        self._transport, self._places_now, self._node, self._rank = (
            transport,
            places_now,
            node,
            rank,
        )
        self._lanes: ShmClient | None = None
        self._places: list[ProcessAddress] = []
        self.parameters = None
        self._sizes, self._ranges, self._incarnation = layout.sizes, ranges, incarnation
        self.reconnect(ranges, incarnation)

    @cached_property
    def gradients(self) -> Flat:  # type: ignore[override]  # made at first use
        """See `WorkerChannel.gradients`."""
        return empty_flat(self._sizes) if self._lanes is None else self._lanes.gradients

    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        """See `WorkerChannel.reconnect`: open lanes to shards of this node that have none; say
        which have one, and why others have not.
        """
        places = self._places_now()
        if ranges is not self._ranges or incarnation != self._incarnation:
            self._ranges, self._places, self._incarnation = ranges, [], incarnation
            if self._lanes is not None:
                self._lanes.begin_anew(ranges, incarnation)
        try:
            self._open_lanes(places)
        except (ArenaError, LaneError) as error:
            log.warning("worker %d: %s; %s", self._rank, error, REMEDY)
        self._places = places
        by_lane = [shard for shard in range(len(ranges)) if self._has_lane(shard)]
        others = [shard for shard in range(len(ranges)) if shard not in by_lane]
        told = "worker %d: shards %s by shared memory (same node), shards %s by Ray objects"
        log.info(told, self._rank, by_lane or "none", others or "none")
        self.routes = Routes(ranges, frozenset(by_lane))
        if not by_lane and "gradients" not in self.__dict__:
            self._lanes = None
        self.parameters = None
        if self._lanes is not None and self._lanes.complete:
            first, second = self._lanes.parameters
            self.parameters = (first, second)

    def _open_lanes(self, places: list[ProcessAddress]) -> None:
        """Open a lane to each shard of this node that is new or has none; raise ArenaError or
        LaneError where one cannot be had.
        """
        changed = [
            i
            for i, place in enumerate(places)
            if i >= len(self._places) or place != self._places[i] or not self._has_lane(i)
        ]
        near = {
            i: address
            for i in changed
            if places[i].node == self._node and (address := places[i].address) is not None
        }
        if near and self._lanes is None and "gradients" not in self.__dict__:
            self._lanes = ShmClient(self._sizes, self._ranges, self._rank, self._incarnation)
        if self._lanes is None:
            return
        for shard in changed:
            self._lanes.drop(shard)
        for shard, address in near.items():
            self._lanes.open(shard, address)

    def _has_lane(self, shard: int) -> bool:
        return self._lanes is not None and shard in self._lanes

    def post(self, messages: Mapping[int, Push] | Mapping[int, TotalNorms]) -> Pending:
        """See `WorkerChannel.post`."""
        if self._lanes is None:
            return self._transport.post(messages)
        self._transport.require_open()
        by_lane = {i: m for i, m in messages.items() if i in self._lanes}
        number = self._lanes.post(by_lane) if by_lane else 0
        others = {i: m for i, m in messages.items() if i not in by_lane}
        return RayChannelPending(
            self._lanes, number, by_lane, self._transport.post(others) if others else None
        )

    def close(self) -> None:
        """See `WorkerChannel.close`."""
        if self._lanes is not None:
            self._lanes.close()


class RayChannelPending(Pending):
    """Answers by lane and by object."""

    def __init__(
        self,
        lanes: ShmClient,
        number: int,
        by_lane: Mapping[int, Push | TotalNorms],
        others: Pending | None,
    ) -> None:
        self._lanes, self._number, self._by_lane, self._others = lanes, number, by_lane, others

    def result(self, timeout_s: float) -> dict[int, Any]:
        """See `Pending.result`."""
        deadline = time.monotonic() + timeout_s
        answers = (
            self._lanes.collect(self._number, len(self._by_lane), deadline) if self._by_lane else {}
        )
        if self._others is not None:
            for shard, message in self._by_lane.items():
                answer = answers[shard]
                if isinstance(answer, RoundResult) and message.want_parameters:
                    answers[shard] = dataclasses.replace(
                        answer, parameters=self._lanes.parameters_of(shard, answer)
                    )
            answers = answers | self._others.result(max(0.0, deadline - time.monotonic()))
        return answers
