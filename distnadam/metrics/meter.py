"""The numbers that one process measures of one optimizer; adding to them costs almost nothing.

The stepping thread adds; an exporter reads from a thread of its own and never writes what a step
writes. Nothing is exported here.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distnadam.metrics.table import METRICS
from distnadam.protocol.messages import Description, ShardSpec
from distnadam.tensors.arrays import Dtypes, Flat
from distnadam.tensors.layout import Ranges

BOUNDS_S = tuple(digit * 10.0**exponent for exponent in range(-5, 2) for digit in (1, 2, 5))
"""Upper bounds of the duration buckets in seconds, from 10 microseconds to 50 s."""
UNNAMED = "unnamed"
"""The value of the tag `optimizer` for an optimizer without a name."""

Sample = tuple[str, Mapping[str, str], float]
"""A metric's name, its tags beside `optimizer`, and its value; a counter's is since the start."""


class Seconds:
    """A histogram of durations; one thread adds to it at a time.

    There is one bucket for each bound of `BOUNDS_S`, and a last one for longer durations.
    """

    __slots__ = ("_counts", "_remainders", "_taken")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._taken = list(self._counts)
        self._remainders = [0.0] * len(self._counts)

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration, once or `count` times."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += count

    def take(self, limit: int) -> list[int]:
        """Return the counts per bucket since the last call, scaled down to about `limit` in all.

        The fraction that rounding cuts off a bucket's count is added to it in a later call, so that
        the proportions are exact in the long run.
        """
        now = list(self._counts)
        new = [count - before for count, before in zip(now, self._taken, strict=True)]
        self._taken = now
        total = sum(new)
        if total <= limit:
            return new
        shares = [
            remainder + count * limit / total
            for remainder, count in zip(self._remainders, new, strict=True)
        ]
        self._remainders = [share % 1 for share in shares]
        return [int(share) for share in shares]


@dataclass(eq=False)
class Traffic:
    """The bytes that one worker's push and pull move on the present channels, and their numbers.

    Args:
        push_bytes: of one push, by how they move: "lane" (shared memory) or "object".
        pull_bytes: of one pull, likewise.
        pushed: how many pushes there were.
        pulled: how many pulls there were.
    """

    push_bytes: Mapping[str, int]
    pull_bytes: Mapping[str, int]
    pushed: int = 0
    pulled: int = 0

    @classmethod
    def of(
        cls,
        ranges: Iterable[Ranges],
        lanes: frozenset[int],
        objects: frozenset[int],
        gradients: Flat,
        pull_dtypes: Dtypes,
    ) -> "Traffic":
        """Return the traffic of a worker with the shards of these ranges.

        Args:
            ranges: the shards', by index.
            lanes: the indices of the shards that are reached through shared memory.
            objects: those reached by Ray's objects; the bytes of all others, by TCP, are counted
                where they are sent.
            gradients: arrays of the gradients' dtypes, by dtype space.
            pull_dtypes: in which workers see the parameters, by dtype space.
        """
        push, pull = {"lane": 0, "object": 0}, {"lane": 0, "object": 0}
        for shard, held in enumerate(ranges):
            if shard not in lanes and shard not in objects:
                continue
            way = "lane" if shard in lanes else "object"
            for space, (begin, end) in held.items():
                push[way] += (end - begin) * gradients[space].itemsize
                pull[way] += (end - begin) * pull_dtypes[space].itemsize
        return cls(push, pull)


class Meter:
    """The numbers of one optimizer in this process.

    Args:
        optimizer: its name, if it has one.
    """

    def __init__(self, optimizer: str | None) -> None:
        self.optimizer = optimizer or UNNAMED
        self.seconds = {
            name: Seconds() for name, metric in METRICS.items() if metric.kind == "histogram"
        }
        self.push = self.seconds["distnadam_push_seconds"]
        self.apply = self.seconds["distnadam_apply_seconds"]
        self.pull = self.seconds["distnadam_pull_seconds"]
        self.step = self.seconds["distnadam_step_seconds"]
        self.save = self.seconds["distnadam_save_seconds"]
        self.save_failures = 0
        self.traffic: list[Traffic] = []
        self.sources: list[Callable[[], Iterable[Sample]]] = []

    def samples(self) -> Iterator[Sample]:
        """Yield the counters and gauges that something in this process counts."""
        moved: dict[tuple[str, str], int] = {}
        for traffic in list(self.traffic):
            for direction, sizes, times in (
                ("push", traffic.push_bytes, traffic.pushed),
                ("pull", traffic.pull_bytes, traffic.pulled),
            ):
                for way, size in sizes.items():
                    moved[way, direction] = moved.get((way, direction), 0) + size * times
        for (way, direction), size in moved.items():
            yield "distnadam_bytes_total", {"transport": way, "direction": direction}, size
        yield "distnadam_save_failures_total", {}, self.save_failures
        for source in list(self.sources):
            yield from source()


def shard_bytes(spec: ShardSpec) -> int:
    """Return the memory of a shard's state in bytes: its arrays, of the parameters two buffers.

    It is as much where workers see bfloat16: a float32 master, and two buffers of half its bytes.
    """
    arrays = 1 + len(spec.config.state_arrays)
    return sum(
        arrays * (end - begin) * np.dtype(space).itemsize
        for space, (begin, end) in spec.ranges.items()
    )


def shard_samples(spec: ShardSpec, now: Description) -> Iterator[Sample]:
    """Yield the numbers that follow from a shard's description."""
    for direction, place in (("pull", 0), ("push", 1)):
        moved = sum(each[place] for each in now.traffic.values())
        yield "distnadam_bytes_total", {"transport": "tcp", "direction": direction}, moved
    yield "distnadam_queue_depth", {}, len(set(now.members) - set(now.waiting_for))
    yield "distnadam_shard_bytes", {"shard": str(spec.index)}, shard_bytes(spec)
    if spec.index == 0:
        yield "distnadam_iterations", {}, now.iterations
    if spec.replicas:
        yield "distnadam_replica_lag_rounds", {}, now.round - (now.replicated or 0)
