"""Which host is slower than the others and what that costs, and the cut of the state that makes the
slowest host's part of a step shortest.

In a round each host receives the pushes for what its shards hold, steps it, and sends it to the
other hosts; what other hosts hold, its workers push and receive. So a host's part of a step is a
convex function of the elements that it holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

SLOW = 1.5
"""A host is slow if it takes this much longer than the median of the others; nearer ones are taken
for equal.
"""
_NAMED = 0.01
"""The least part of a step that a slow host is named for."""
_PAYS = 0.05
"""The least part of the slowest host's time that another cut must save."""
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What one host has done in the rounds between two looks.

    Attributes:
        host: its address.
        shards: the indices of its shards.
        elements: that these hold.
        step_s: seconds in which they step one element, if known.
        link_bytes_per_s: of its cable, if known.
        push_bytes: that it sends, in a round, for each element that another host holds.
        pull_bytes: that it receives likewise.
    """

    host: str
    shards: tuple[int, ...] = ()
    elements: int = 0
    step_s: float | None = None
    link_bytes_per_s: float | None = None
    push_bytes: float = 0.0
    pull_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SlowHost:
    """A host that the others wait for.

    Attributes:
        host: its address.
        what: what is slow: "cable" or "CPU".
        rate: bytes per second of its cable, or elements per second that its shards step.
        usual: the median of the others.
        costs_s: seconds of a step that it takes longer than it would at that rate.
        share: the part of a step that these are.
    """

    host: str
    what: str
    rate: float
    usual: float
    costs_s: float
    share: float

    def in_words(self) -> str:
        """Return a sentence."""
        rates = f"carries {self.rate / 1e6:.3g} MB/s, the others' {self.usual / 1e6:.3g}"
        if self.what == "CPU":
            rates = (
                f"steps {self.rate / 1e6:.3g} million parameters a second, the others' "
                f"{self.usual / 1e6:.3g}"
            )
        return (
            f"{self.host} is slow: its {self.what} {rates}, which costs "
            f"{1e3 * self.costs_s:.3g} ms of each step ({100 * self.share:.0f}%)"
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the state lies on the hosts, and how it would better.

    Attributes:
        before: elements by host.
        after: likewise, of the better cut.
        seconds_before: each host's part of a step.
        seconds_after: likewise.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    seconds_before: Mapping[str, float]
    seconds_after: Mapping[str, float]

    @property
    def gain(self) -> float:
        """How many times as long the slowest host's part is now."""
        return max(self.seconds_before.values()) / max(max(self.seconds_after.values()), 1e-12)

    @property
    def pays(self) -> bool:
        """Whether the other cut saves enough."""
        return self.gain > 1 / (1 - _PAYS)


def slow_hosts(paces: Sequence[Pace], round_s: float) -> tuple[SlowHost, ...]:
    """Return the hosts that are slower than the others, as far as a step shows it.

    Args:
        paces: of all hosts.
        round_s: seconds of a round.
    """
    found = []
    for pace in paces:
        others = [each for each in paces if each.host != pace.host]
        link = _usual(each.link_bytes_per_s for each in others)
        step = _usual(each.step_s for each in others)
        for what, rate, usual, as_others in (
            ("cable", pace.link_bytes_per_s, link, replace(pace, link_bytes_per_s=link)),
            ("CPU", _inverse(pace.step_s), _inverse(step), replace(pace, step_s=step)),
        ):
            if rate is None or usual is None or rate * SLOW > usual:
                continue
            costs = _seconds(paces, pace, pace.elements)
            costs -= _seconds(paces, as_others, pace.elements)
            if costs >= _NAMED * round_s:
                found.append(
                    SlowHost(
                        host=pace.host,
                        what=what,
                        rate=rate,
                        usual=usual,
                        costs_s=costs,
                        share=min(1.0, costs / round_s),
                    )
                )
    return tuple(found)


def best_cut(paces: Sequence[Pace]) -> Cut:
    """Return the cut that makes the slowest host's part of a step shortest.

    Hosts without shards get none. Of equally good cuts it is one that moves little.
    """
    even = [_evened(paces, pace) for pace in paces]
    holders = [pace for pace in even if pace.shards]
    total = sum(pace.elements for pace in even)
    seconds = {pace.host: partial(_seconds, even, pace) for pace in even}
    low, high = 0.0, max(seconds[pace.host](pace.elements) for pace in even)
    best = {pace.host: (pace.elements, pace.elements) for pace in holders}
    for _ in range(_HALVINGS):
        limit = (low + high) / 2
        spans = {pace.host: _span(seconds[pace.host], total, limit) for pace in holders}
        known = {host: span for host, span in spans.items() if span is not None}
        least = sum(span[0] for span in known.values())
        most = sum(span[1] for span in known.values())
        if len(known) == len(holders) and least <= total <= most:
            best, high = known, limit
        else:
            low = limit
    before = {pace.host: pace.elements for pace in holders}
    after = _within(best, before, total)
    return Cut(
        before=before,
        after=after,
        seconds_before={host: seconds[host](before.get(host, 0)) for host in seconds},
        seconds_after={host: seconds[host](after.get(host, 0)) for host in seconds},
    )


def shares_of(paces: Sequence[Pace], after: Mapping[str, int]) -> list[int]:
    """Return each shard's share of the state, in the order of the shards, by its host's part."""
    shares = {}
    for pace in paces:
        for place, shard in enumerate(pace.shards):
            count = len(pace.shards)
            part = after[pace.host]
            shares[shard] = part * (place + 1) // count - part * place // count
    return [shares[shard] for shard in sorted(shares)]


def _seconds(paces: Sequence[Pace], pace: Pace, elements: int) -> float:
    """Return a host's part of a step if it held so many elements."""
    total = sum(each.elements for each in paces)
    others = [each for each in paces if each.host != pace.host]
    stepped = elements * (pace.step_s or 0.0)
    if pace.link_bytes_per_s is None:
        return stepped
    pushed = elements * sum(each.push_bytes for each in others)
    pulled = elements * sum(each.pull_bytes for each in others)
    rest = total - elements
    moved = max(pushed, rest * pace.push_bytes) + max(pulled, rest * pace.pull_bytes)
    return stepped + moved / pace.link_bytes_per_s


def _span(seconds: partial[float], total: int, limit: float) -> tuple[int, int] | None:
    """Return the least and the most elements that take a host no longer than the limit; None if
    any number takes longer.
    """
    low, high = 0, total
    while high - low > 2:  # to the least of a convex function
        third = (high - low) // 3
        if seconds(low + third) <= seconds(high - third):
            high -= third
        else:
            low += third
    middle = min(range(low, high + 1), key=seconds)
    if seconds(middle) > limit:
        return None
    return _edge(seconds, limit, middle, 0), _edge(seconds, limit, middle, total)


def _edge(seconds: partial[float], limit: float, inside: int, outside: int) -> int:
    """Return the last number within the limit on the way to another."""
    if seconds(outside) <= limit:
        return outside
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if seconds(middle) <= limit:
            inside = middle
        else:
            outside = middle
    return inside


def _within(
    spans: Mapping[str, tuple[int, int]], before: Mapping[str, int], total: int
) -> dict[str, int]:
    """Return numbers within the spans whose sum is the total, near those before."""
    found = {host: min(max(before[host], low), high) for host, (low, high) in spans.items()}
    missing = total - sum(found.values())
    room = {
        host: (high - found[host] if missing > 0 else found[host] - low)
        for host, (low, high) in spans.items()
    }
    free = sum(room.values())
    for host, has in room.items():
        part = 0 if free == 0 else has * abs(missing) // free
        part = -part if missing < 0 else part
        found[host], missing, free = found[host] + part, missing - part, free - has
    return found


def _evened(paces: Sequence[Pace], pace: Pace) -> Pace:
    """Return a host's pace, as the others' where that is near or its own is not known."""
    link, step = pace.link_bytes_per_s, pace.step_s
    usual_link = _usual(each.link_bytes_per_s for each in paces)
    usual_step = _usual(each.step_s for each in paces)
    if _is_near(link, usual_link):
        link = usual_link
    if _is_near(step, usual_step):
        step = usual_step
    return replace(pace, link_bytes_per_s=link, step_s=step)


def _usual(values: Iterable[float | None]) -> float | None:
    """Return the median of what is known; None if nothing is."""
    return median(known) if (known := [each for each in values if each]) else None


def _is_near(value: float | None, usual: float | None) -> bool:
    """Whether a value is not known, or about the usual one."""
    return not value or (usual is not None and 1 / SLOW < value / usual < SLOW)


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None
