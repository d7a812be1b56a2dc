"""What each host has done in the rounds between two looks at a running optimizer. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distnadam.planning.balance import Pace


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """What one shard had done at some moment.

    Attributes:
        index: its index.
        host: its host's address.
        elements: that it holds.
        round: the last round that it decided.
        stepped_s: seconds in which its process has computed steps.
        sent: bytes sent by TCP to each other host.
        received: bytes received from each.
        links: bytes per second at which the system delivered to each.
    """

    index: int
    host: str
    elements: int
    round: int
    stepped_s: float
    sent: Mapping[str, int]
    received: Mapping[str, int]
    links: Mapping[str, float]


def paces(then: Sequence[ShardWork], now: Sequence[ShardWork]) -> tuple[Pace, ...]:
    """Return the pace of each host; () if no round was decided, or shards were replaced.

    A cable's speed is the fastest that was seen at it, since a transfer is as slow as the slower of
    its two ends: of two hosts alone none is slower.
    """
    before = {each.index: each for each in then}
    if before.keys() != {each.index for each in now} or not now:
        return ()
    pairs = [(before[each.index], each) for each in now]
    if any(
        (a.host, a.elements) != (b.host, b.elements)
        or b.round <= a.round
        or b.stepped_s < a.stepped_s
        for a, b in pairs
    ):
        return ()
    hosts = {each.host for each in now}.union(
        *(each.received for each in now), *(each.sent for each in now)
    )
    return tuple(_pace(host, pairs) for host in sorted(hosts))


def _pace(host: str, pairs: Sequence[tuple[ShardWork, ShardWork]]) -> Pace:
    here = [(a, b) for a, b in pairs if b.host == host]
    stepped = sum(b.elements * (b.round - a.round) for a, b in here)
    seconds = sum(b.stepped_s - a.stepped_s for a, b in here)
    away = [(a, b) for a, b in pairs if b.host != host]
    rounds = sum(b.elements * (b.round - a.round) for a, b in away)
    pushed = sum(max(0, b.received.get(host, 0) - a.received.get(host, 0)) for a, b in away)
    pulled = sum(max(0, b.sent.get(host, 0) - a.sent.get(host, 0)) for a, b in away)
    links = [rate for _, b in here for rate in b.links.values()]
    links += [b.links[host] for _, b in away if host in b.links]
    return Pace(
        host=host,
        shards=tuple(b.index for _, b in here),
        elements=sum(b.elements for _, b in here),
        step_s=seconds / stepped if stepped and seconds > 0 else None,
        link_bytes_per_s=max(links, default=None),
        push_bytes=pushed / rounds if rounds else 0.0,
        pull_bytes=pulled / rounds if rounds else 0.0,
    )
