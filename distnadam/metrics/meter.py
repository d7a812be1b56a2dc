"""What one process measures of one optimizer: plain numbers that cost next to nothing to add to.
Nothing is exported here.

Who steps adds to them; an exporter reads them now and then, in a thread of its own, and never
writes what a step writes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distnadam.metrics.table import METRICS
from distnadam.protocol.messages import Description, ShardSpec
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges

BOUNDS_S = tuple(digit * 10.0**exponent for exponent in range(-5, 2) for digit in (1, 2, 5))
"""Upper ends of the buckets that seconds are counted in, from 10 microseconds to 50 s."""
UNNAMED = "unnamed"
"""What the tag `optimizer` says of an optimizer without a name."""

Sample = tuple[str, Mapping[str, str], float]
"""A metric's name, its tags beside `optimizer`, and its value now; a counter's since the beginning.
"""


class Seconds:
    """How many durations fell in each bucket, the last one for those longer than all bounds; added
    to by one thread at a time.
    """

    __slots__ = ("_counts", "_owed", "_read")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._read, self._owed = list(self._counts), [0.0] * len(self._counts)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1

    def take(self, enough: int) -> list[int]:
        """Return how many came in each bucket since the last call; where those are more than
        enough, about so many, in proportion.

        What a bucket's share leaves over is kept for later calls, so that in the long run the
        proportions are exact.
        """
        now = list(self._counts)
        new = [count - before for count, before in zip(now, self._read, strict=True)]
        self._read, total = now, sum(new)
        if total <= enough:
            return new
        shares = [
            owed + count * enough / total for owed, count in zip(self._owed, new, strict=True)
        ]
        self._owed = [share % 1 for share in shares]
        return [int(share) for share in shares]


@dataclass(eq=False)
class Traffic:
    """The bytes that one worker's push and pull move while everything is reached as it is, and how
    often they did.
    """

    push_bytes: Mapping[str, int]
    pull_bytes: Mapping[str, int]
    pushed: int = 0
    pulled: int = 0

    @classmethod
    def of(cls, ranges: Iterable[Ranges], lanes: frozenset[int], gradients: Flat) -> "Traffic":
        """Return that of these shards, some of which are reached by lanes, with gradients of these
        dtypes.
        """
        push, pull = {"lane": 0, "object": 0}, {"lane": 0, "object": 0}
        for shard, held in enumerate(ranges):
            way = "lane" if shard in lanes else "object"
            for space, (begin, end) in held.items():
                push[way] += (end - begin) * gradients[space].itemsize
                pull[way] += (end - begin) * np.dtype(space).itemsize
        return cls(push, pull)


class Meter:
    """The numbers of one optimizer in this process.

    Args:
        optimizer: its name, None where it has none.
    """

    def __init__(self, optimizer: str | None) -> None:
        self.optimizer = optimizer or UNNAMED
        self.seconds = {
            name: Seconds() for name, metric in METRICS.items() if metric.kind == "histogram"
        }
        self.push, self.apply, self.pull, self.step, self.save = (
            self.seconds[f"distnadam_{what}_seconds"]
            for what in ("push", "apply", "pull", "step", "save")
        )
        self.save_failures = 0
        self.traffic: list[Traffic] = []
        self.sources: list[Callable[[], Iterable[Sample]]] = []

    def samples(self) -> Iterator[Sample]:
        """Yield the counters and gauges that are not zero for want of anybody who counts here."""
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


def state_bytes(ranges: Ranges) -> int:
    """Return the bytes of a shard's state: two buffers of its parameters, and both moments."""
    return sum(
        4 * (end - begin) * np.dtype(space).itemsize for space, (begin, end) in ranges.items()
    )


def shard_samples(spec: ShardSpec, now: Description) -> Iterator[Sample]:
    """Yield what a shard's description says of it."""
    yield "distnadam_queue_depth", {}, len(set(now.members) - set(now.waiting_for))
    yield "distnadam_shard_bytes", {"shard": str(spec.index)}, state_bytes(spec.ranges)
    if spec.index == 0:
        yield "distnadam_iterations", {}, now.iterations
    if spec.replicas:
        yield "distnadam_replica_lag_rounds", {}, now.round - (now.replicated or 0)
