"""A worker's way to the shards of a Ray cluster: lanes to those of its own node, the backend's objects to all others. No Ray here."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnadam.arrays import empty_flat
from distnadam.backends.base import Backend, Link, Pending
from distnadam.errors import ArenaError, LaneError
from distnadam.layout import Layout, Ranges
from distnadam.messages import Decided, Norms, Push
from distnadam.transport.doorbell import Address
from distnadam.transport.lanes import Lanes

log = logging.getLogger("distnadam")

REMEDY = "Ray objects are used instead, which cost more time: give the node or container more memory, or run fewer workers on it"


@dataclass(frozen=True)
class Place:
    """Where a shard runs: its Ray node, and where its lanes are called, or why it has none."""

    node: str
    address: Address | None = None
    reason: str | None = None


class RayLink(Link):
    """Lanes to the shards of this worker's node, Ray objects to all others."""

    def __init__(self, backend: Backend, layout: Layout, lanes: Lanes | None) -> None:
        self._backend, self._lanes = backend, lanes
        self.gradients = empty_flat(layout.sizes) if lanes is None else lanes.gradients
        if lanes is not None and lanes.complete:
            first, second = lanes.parameters
            self.parameters = (first, second)

    def post(self, messages: Mapping[int, Push] | Mapping[int, Norms]) -> Pending:
        """See `Link.post`."""
        if self._lanes is None:
            return self._backend.post(messages)
        self._backend.require_open()
        if self.parameters is not None:  # every shard has a lane
            return RayLinkPending(self._lanes, self._lanes.post(messages), messages, None)
        by_lane = {i: m for i, m in messages.items() if i in self._lanes}
        number = self._lanes.post(by_lane) if by_lane else 0
        others = {i: m for i, m in messages.items() if i not in by_lane}
        return RayLinkPending(self._lanes, number, by_lane, self._backend.post(others) if others else None)

    def close(self) -> None:
        """See `Link.close`."""
        if self._lanes is not None:
            self._lanes.close()


class RayLinkPending(Pending):
    """Answers by lane and by object."""

    def __init__(self, lanes: Lanes, number: int, by_lane: Mapping[int, Push | Norms], others: Pending | None) -> None:
        self._lanes, self._number, self._by_lane, self._others = lanes, number, by_lane, others

    def result(self, timeout_s: float) -> dict[int, Any]:
        """See `Pending.result`."""
        deadline = time.monotonic() + timeout_s
        answers = self._lanes.collect(self._number, len(self._by_lane), deadline) if self._by_lane else {}
        if self._others is not None:
            for shard, message in self._by_lane.items():
                answer = answers[shard]
                if isinstance(answer, Decided) and message.want_parameters:
                    answers[shard] = dataclasses.replace(answer, parameters=self._lanes.parameters_of(shard, answer))
            answers = answers | self._others.result(max(0.0, deadline - time.monotonic()))
        return answers


def open_lanes(node: str, places: Sequence[Place], layout: Layout, ranges: list[Ranges], rank: int, incarnation: int) -> Lanes | None:
    """Return a worker's lanes to the shards of its node, None where there are none; say which shards have one and why others have not."""
    near = {shard: place.address for shard, place in enumerate(places) if place.node == node and place.address is not None}
    lanes, refused = None, []
    if near:
        try:
            lanes = Lanes(layout.sizes, ranges, rank, incarnation)
            for shard, address in near.items():
                lanes.open(shard, address)
        except (ArenaError, LaneError) as error:
            refused.append(str(error))
    if refused:
        log.warning("worker %d: %s; %s", rank, "; ".join(refused), REMEDY)
    by_lane = [shard for shard in range(len(ranges)) if lanes is not None and shard in lanes]
    by_object = [shard for shard in range(len(ranges)) if shard not in by_lane]
    log.info("worker %d: shards %s by shared memory (same node), shards %s by Ray objects", rank, by_lane or "none", by_object or "none")
    if lanes is not None and not by_lane:
        return None
    return lanes
