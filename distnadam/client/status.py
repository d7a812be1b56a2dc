"""What a running optimizer does, seen from outside. Every shard is asked, none waited for long.

No Ray.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from distnadam.backends.base import Backend
from distnadam.backends.factory import connect
from distnadam.checkpoint import store
from distnadam.client.paces import ShardWork, paces
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import CheckpointError, DistNadamError, NotRunning, ShardLost
from distnadam.metrics.meter import shard_bytes
from distnadam.places import shown
from distnadam.planning.balance import Pace, SlowHost, slow_hosts
from distnadam.protocol.messages import NO_NORM, Describe, Description, ShardSpec
from distnadam.schedules import rate_at
from distnadam.tensors.layout import sizes_of
from distnadam.transport.link import carriers

ANSWER_S = 5.0
"""Seconds in which a shard says where it stands."""


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """One shard.

    Attributes:
        index: its index.
        node: where it runs.
        state: its phase, or "silent" or "dead".
        round: the last round that it decided, if it answers.
        bytes: of its state.
        standby: its standby's node.
        lag: the rounds that the standby is behind, if known.
        waits_for: the ranks whose push the next round lacks.
        idle_s: seconds since it last computed.
        stepped_s: seconds in which its process has computed steps, so far.
        load: the share of the time since the last look in which it computed steps, if known.
    """

    index: int
    node: str
    state: str
    round: int | None = None
    bytes: int | None = None
    standby: str | None = None
    lag: int | None = None
    waits_for: tuple[int, ...] = ()
    idle_s: float | None = None
    stepped_s: float | None = None
    load: float | None = None


@dataclass(frozen=True)
class HostStatus:
    """A host's bytes per second by TCP to and from others, as the shards count them.

    They are None in a first look, which has no rate.
    """

    host: str
    sent_bytes_per_s: float | None
    received_bytes_per_s: float | None


Moved = Mapping[tuple[int, str, str], int]
"""By shard, sending host and receiving host: the bytes that the shard has seen go there."""


@dataclass(frozen=True)
class Status:
    """The status of an optimizer.

    `recoveries` is how often a standby took over, or all shards went back, and `is_rewound` whether
    the latter was the last change. `method` says by which formula tensors step, with weight decay
    and groups; `awaited` what the next step waits for, and `transport` how gradients and parameters
    move between which processes. `gradient_norm` is the last round's, where clipping needs it, and
    `loss_scale` the next one's.
    `paces` is what each host did since the last look, and `slow` the hosts that the others wait
    for. `moved` and `work` are what they and `hosts` follow from, and `at` the time by this
    process's monotonic clock, for the next look.
    """

    name: str | None
    step: int
    round: int
    skipped: int
    lr: float
    steps_per_s: float | None
    shards: tuple[ShardStatus, ...]
    workers: Mapping[int, str]
    replicas: int
    checkpoint: str | None
    at: float
    method: str = ""
    awaited: str = ""
    transport: str = ""
    hosts: tuple[HostStatus, ...] = ()
    recoveries: int = 0
    is_rewound: bool = False
    moved: Moved = field(default_factory=dict)
    work: tuple[ShardWork, ...] = ()
    paces: tuple[Pace, ...] = ()
    slow: tuple[SlowHost, ...] = ()
    gradient_norm: float | None = None
    loss_scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        fields = asdict(self)
        return {key: fields[key] for key in fields if key not in ("at", "moved", "work")} | {
            "workers": [{"rank": r, "state": s} for r, s in self.workers.items()]
        }


class RunningOptimizer:
    """An optimizer that runs, whoever started it.

    Args:
        backend: reaches its shards.
        spec: of one of them.
    """

    def __init__(self, backend: Backend, spec: ShardSpec) -> None:
        self._backend = backend
        self._spec = spec

    @classmethod
    def named(cls, name: str) -> "RunningOptimizer":
        """Return the one of that name on the Ray cluster of this process, or of RAY_ADDRESS.

        Raises:
            NotRunning: there is none.
        """
        return cls(*connect(name))

    @classmethod
    def of(cls, shards: ShardGroup) -> "RunningOptimizer":
        """Return the one of these shards.

        Raises:
            ShardLost, TimeoutError: shard 0 does not answer.
        """
        answer = shards.backend.transport.post({0: Describe(spec=True)}).result(ANSWER_S)
        return cls(shards.backend, answer[0].spec)

    def status(self, earlier: Status | None = None) -> Status:
        """Return its status, with the steps per second since an earlier one.

        Raises:
            NotRunning: no shard answers.
        """
        answers, shards, work = self._ask()
        spec, first, now = self._spec, min(answers, key=lambda seen: seen.round), time.monotonic()
        moved = _moved(work)
        if earlier is not None:
            shards = _with_loads(shards, earlier, now)
        found: tuple[Pace, ...] = ()
        seconds = 0.0
        if earlier is not None and first.round > earlier.round:
            found = paces(earlier.work, work)
            seconds = (now - earlier.at) / (first.round - earlier.round)
        recoveries = 0
        with suppress(DistNadamError):  # the supervisor may be what died
            recoveries = self._backend.supervisor.shard_recoveries()
        return Status(
            name=spec.name,
            step=first.iterations,
            round=first.round,
            skipped=first.skipped,
            lr=rate_at(first.config.lr, first.iterations),
            gradient_norm=None if first.gradient_norm == NO_NORM else first.gradient_norm,
            loss_scale=first.loss_scale or None,
            steps_per_s=None
            if earlier is None
            else (first.iterations - earlier.step) / (now - earlier.at),
            shards=tuple(shards),
            workers={rank: _worker(rank, first) for rank in range(spec.num_workers)},
            replicas=spec.replicas,
            checkpoint=_newest(self._saves_to(answers)),
            method=first.config.in_words(),
            awaited=awaited(shards),
            hosts=_hosts(moved, earlier, now),
            moved=moved,
            work=work,
            paces=found,
            slow=slow_hosts(found, seconds),
            transport=carriers(spec.options.transport, spec.options.port_range),
            recoveries=recoveries,
            is_rewound=any(seen.epoch_reason == "rewound" for seen in answers),
            at=now,
        )

    def checkpoint_dir(self) -> str | None:
        """Return the directory that it saves to: the option's, or the last save's or restore's."""
        return self._saves_to(self._ask()[0])

    def _saves_to(self, answers: list[Description]) -> str | None:
        return self._spec.options.checkpoint_dir or next(
            (seen.saved for seen in answers if seen.saved is not None), None
        )

    def _ask(self) -> tuple[list[Description], list[ShardStatus], tuple[ShardWork, ...]]:
        """Return what the shards say that answer in time, the status of all, and their work."""
        backend, transport = self._backend, self._backend.transport
        answers, shards, work = list[Description](), list[ShardStatus](), list[ShardWork]()
        transport.refresh()
        asked = {
            index: transport.post({index: Describe(spec=True)})
            for index in range(len(transport.cuts))
        }
        standbys = backend.standbys() if self._spec.replicas else {}
        deadline = time.monotonic() + ANSWER_S
        for index, host in enumerate(backend.hosts()):
            shard = ShardStatus(index=index, node=host, state="", standby=standbys.get(index))
            left_s = max(0.1, deadline - time.monotonic())
            try:
                seen: Description = asked[index].result(left_s)[index]
            except TimeoutError:
                shards.append(replace(shard, state="silent"))
            except ShardLost:
                shards.append(replace(shard, state="dead"))
            else:
                answers.append(seen)
                shards.append(_described(shard, seen))
                work.append(_work(index, host.split()[0], seen))
        if not answers:
            raise NotRunning(f"no shard of {self._spec.name!r} answers")
        return answers, shards, tuple(work)


def _described(shard: ShardStatus, seen: Description) -> ShardStatus:
    """Return the status of a shard that describes itself so."""
    return replace(
        shard,
        state=seen.phase,
        round=seen.round,
        bytes=None if seen.spec is None else shard_bytes(seen.spec),
        lag=None if seen.replicated is None else seen.round - seen.replicated,
        waits_for=seen.waiting_for,
        idle_s=seen.idle_s,
        stepped_s=seen.stepped_s,
    )


def _moved(work: Sequence[ShardWork]) -> Moved:
    """Return the bytes that went between hosts, as the shards have counted them."""
    moved = Counter[tuple[int, str, str]]()
    for shard in work:
        for there, sent in shard.sent.items():
            moved[shard.index, shard.host, there] += sent
        for there, received in shard.received.items():
            moved[shard.index, there, shard.host] += received
    return dict(moved)


def _work(index: int, host: str, seen: Description) -> ShardWork:
    return ShardWork(
        index=index,
        host=host,
        elements=0 if seen.spec is None else sum(sizes_of(seen.spec.ranges).values()),
        round=seen.round,
        stepped_s=seen.stepped_s,
        sent={there: sent for there, (sent, _) in seen.traffic.items()},
        received={there: received for there, (_, received) in seen.traffic.items()},
        links=seen.links,
    )


def _with_loads(shards: list[ShardStatus], earlier: Status, now: float) -> list[ShardStatus]:
    """Return the shards with their load since an earlier look, where it is of the same process."""
    before = {shard.index: shard.stepped_s for shard in earlier.shards}
    found = []
    for shard in shards:
        then, load = before.get(shard.index), None
        if then is not None and shard.stepped_s is not None and shard.stepped_s >= then:
            load = min(1.0, (shard.stepped_s - then) / max(now - earlier.at, 1e-9))
        found.append(replace(shard, load=load))
    return found


def awaited(shards: Sequence[ShardStatus]) -> str:
    """Return what the next step waits for, in words: shards, or the ranks whose push they lack."""
    lost = [shard for shard in shards if shard.round is None]
    if lost:
        return "; ".join(f"shard {shard.index}, which is {shard.state}" for shard in lost)
    least = min(shard.round for shard in shards if shard.round is not None)
    behind = [shard for shard in shards if shard.round == least]
    lacking: dict[tuple[int, ...], list[ShardStatus]] = {}
    for shard in behind:
        lacking.setdefault(shard.waits_for, []).append(shard)
    ranks = {ranks: at for ranks, at in lacking.items() if ranks}
    found = [
        f"the push of {_listed('rank', who)} to {_listed('shard', [each.index for each in at])}, "
        f"which computed last {max(each.idle_s or 0.0 for each in at):.1f} s ago"
        for who, at in ranks.items()
    ]
    return "; ".join(found) or "; ".join(f"shard {each.index}: {each.state}" for each in behind)


def _listed(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _hosts(moved: Moved, earlier: Status | None, now: float) -> tuple[HostStatus, ...]:
    """Return the bytes per second of each host since an earlier look.

    A shard that took another's place since then begins at nothing.
    """
    before = {} if earlier is None else earlier.moved
    rates: dict[str, list[int]] = {}
    for key, total in moved.items():
        new = total - before.get(key, 0)
        new = total if new < 0 else new
        _, sender, receiver = key
        rates.setdefault(sender, [0, 0])[0] += new
        rates.setdefault(receiver, [0, 0])[1] += new
    seconds = None if earlier is None else now - earlier.at
    return tuple(
        HostStatus(host, sent / seconds, received / seconds)
        if seconds
        else HostStatus(host, None, None)
        for host, (sent, received) in sorted(rates.items())
    )


def _newest(directory: str | None) -> str | None:
    """Return the newest checkpoint in a directory, as far as it can be seen from here."""
    if directory is None:
        return None
    with suppress(CheckpointError):
        for step in reversed(store.step_directories(directory)):
            if store.MANIFEST in step.files():
                return str(step)
    return f"{shown(directory)} (nothing to be seen from here)"


def _worker(rank: int, seen: Description) -> str:
    if rank in seen.dead:
        return "died"
    if rank in seen.left:
        return "closed"
    if rank not in seen.members:
        return "gone: the others go on without it"
    if rank not in seen.newest:
        return "not there yet"
    return "computing" if rank in seen.waiting_for else "waiting for others"
