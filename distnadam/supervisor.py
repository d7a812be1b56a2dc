"""The one who decides, for all shards at once, what happens when processes die: observes, asks `policy`, carries it out. No Ray.

One supervisor per optimizer. Everything it knows it can read again from the shards, so a successor goes on where a dead one stopped.
What it can do to processes is the seam `Crew`.
"""

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distnadam import policy
from distnadam.arrays import Flat, cut_flat
from distnadam.checkpoint import store
from distnadam.checkpoint.format import leftover_readers
from distnadam.errors import CheckpointError, DistNadamError, IllegalMessage, ShardLost, StepTimeout, Unrecoverable
from distnadam.messages import Describe, Description, Hold, Join, Joined, Release, ShardSpec
from distnadam.orders import Attach, GiveUp, Load, Reign, Schedule
from distnadam.takeover import adoptions

log = logging.getLogger("distnadam")

TICK_S = 0.2
"""Seconds between two looks where nothing happens."""
_ASK_S = 60.0
_LOAD_S = 3600.0
_ADMIN = "supervisor"


@dataclass(frozen=True)
class Hired:
    """One process: whose shard, a handle that only the crew understands, and where it is to be found."""

    index: int
    handle: Any
    place: Any


class Crew(ABC):
    """What a supervisor can do to the processes of its optimizer."""

    @abstractmethod
    def hire(self, spec: ShardSpec, *, standby: bool, near: Sequence[Hired]) -> Hired:
        """Make a process for a shard, or its standby, beside the present ones; raise ClusterError where none can be had."""

    @abstractmethod
    def promote(self, standby: Hired, reign: Reign, *, near: Sequence[Hired]) -> Hired:
        """Make a standby its shard's primary, once it has all that the dead one sent."""

    @abstractmethod
    def fence(self, hired: Hired) -> None:
        """End a process for certain, so that it can neither write nor answer any more."""

    @abstractmethod
    def dismiss(self, hired: Hired) -> None:
        """End a process that is not needed any more."""

    @abstractmethod
    def watch(self, hired: Hired) -> None:
        """Tell the supervisor (`died`) as soon as this process ends."""

    @abstractmethod
    def ask(self, hired: Mapping[int, Hired], messages: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """Send each its message; return by index the answers, or the errors: ShardLost of one that died, StepTimeout of a silent one."""


@dataclass(frozen=True)
class Roster:
    """Who is to be called for which shard; a higher version replaces a lower one. `failed` says why there is none any more."""

    version: int
    shards: tuple[Hired, ...]
    failed: str | None = None


@dataclass
class Recoveries:
    """What was survived, for whoever asks."""

    promoted: int = 0
    rewound: int = 0
    departed: int = 0
    seconds: list[float] = field(default_factory=list)


class Supervisor:
    """See the module; `start` makes the shards, `begin` starts the watch.

    Args:
        specs: the shards'.
        replicas: standbys per shard, 0 or 1.
        crew: what it does to processes.
    """

    def __init__(self, specs: Sequence[ShardSpec], replicas: int, crew: Crew) -> None:
        self._specs, self._replicas, self._crew = list(specs), replicas, crew
        self._options = specs[0].options
        self._rules = policy.Rules(self._options.rejoin_timeout_s, self._options.min_workers)
        self._shards: list[Hired] = []
        self._standbys: dict[int, Hired] = {}
        self._filling: set[int] = set()
        self._gone: set[Hired] = set()
        self._dead: dict[int, tuple[int, float]] = {}
        self._asking: set[int] = set()
        self._given_up: set[int] = set()
        self._newest: dict[int, int] = {}
        self._stuck = False
        self._bad: set[str] = set()
        self._directory: str | None = self._options.checkpoint_dir
        self._initial: Flat | None = None
        self._changed: str | None = None
        self._holder: tuple[str, float] | None = None
        self._next_ping = 0.0
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Future[Roster]]] = []
        self._roster = Roster(0, ())
        self.recoveries = Recoveries()
        self._closed = False
        self._hirer = ThreadPoolExecutor(1, "hirer")
        self._thread: threading.Thread | None = None

    # What others tell and ask

    def adopt(self, shards: Sequence[Hired], standbys: Mapping[int, Hired]) -> None:
        """Take processes over that were made already."""
        self._shards, self._standbys = list(shards), dict(standbys)
        self._publish()

    def begin(self, *, initial: Flat | None, directory: str | None) -> None:
        """Start the watch over shards that have their state: parameters with nothing behind them, or a checkpoint's."""
        self._initial = initial if self._options.retain_initial else None
        self._directory = directory or self._directory
        for hired in (*self._shards, *self._standbys.values()):
            self._crew.watch(hired)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()
        self._events.put(("look", None))

    def died(self, hired: Hired) -> None:
        """Take that a process ended."""
        self._events.put(("died", hired))

    def notice(self, index: int, what: str, rank: int, incarnation: int) -> None:
        """Take what a shard says of a rank or of its standby."""
        self._events.put((what, (index, rank, incarnation)))

    def changing(self, what: str) -> None:
        """Take that the state is about to be replaced from outside, which going back to the last checkpoint would lose."""
        self._changed = what

    def saved(self, root: str) -> None:
        """Take that a checkpoint is complete."""
        self._directory, self._changed, self._initial = self._options.checkpoint_dir or root, None, None

    def roster(self, newer_than: int, suspect: bool = False) -> Future[Roster]:
        """Return the roster once there is one newer than what the caller has seen; with a suspicion, after a look, whatever it finds."""
        future: Future[Roster] = Future()
        with self._lock:
            if self._roster.version > newer_than or self._roster.failed:
                future.set_result(self._roster)
            else:
                self._waiting.append((newer_than, future))
        if suspect:
            self._events.put(("suspect", future))
        return future

    def lost_ranks(self) -> dict[int, int]:
        """Return the ranks whose worker died and that nobody has taken over, and the incarnation that died."""
        return {rank: incarnation for rank, (incarnation, _) in dict(self._dead).items()}

    def close(self) -> None:
        """Stop watching, then end every process."""
        self._closed = True
        self._events.put(("look", None))
        if self._thread is not None:
            self._thread.join()
        self._hirer.shutdown(cancel_futures=True)
        for hired in (*self._shards, *self._standbys.values()):
            self._crew.dismiss(hired)

    # The watch

    def _run(self) -> None:
        while not self._closed:
            events = self._drain()
            for what, about in events:
                self._take(what, about)
            try:
                self._look(bool(events))
            except Exception as error:
                log.exception("supervisor: %s", error)
                self._publish(failed=f"the supervisor could not recover: {type(error).__name__}: {error}")
            for what, about in events:
                if what == "suspect" and not about.done():
                    about.set_result(self._roster)

    def _drain(self) -> list[tuple[str, Any]]:
        events = []
        try:
            events.append(self._events.get(timeout=TICK_S))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _take(self, what: str, about: Any) -> None:
        if what == "died":
            self._gone.add(about)
            if about in self._standbys.values():
                del self._standbys[about.index]
        elif what == "joined":
            _, rank, incarnation = about
            self._newest[rank] = max(self._newest.get(rank, 0), incarnation)
            if rank in self._dead and incarnation > self._dead[rank][0]:
                del self._dead[rank]
            self._given_up.discard(rank)
            self._asking.add(rank)
        elif what == "died rank":
            index, rank, incarnation = about
            if self._newest.get(rank, 0) <= incarnation and rank not in self._dead:
                self._dead[rank] = (incarnation, time.monotonic())
                self._asking.discard(rank)
                log.warning(
                    "worker %d died; a new worker(%d) may take the rank over within %g s", rank, rank, self._options.rejoin_timeout_s
                )
                self._settle(rank, incarnation)
        elif what == "left":
            self._asking.discard(about[1])
        elif what == "stuck":
            self._stuck = True
        elif what == "hired":
            self._filling.discard(about[0])
            if about[1] is not None:
                self._standbys[about[0]] = about[1]
                self._crew.watch(about[1])

    def _look(self, prompted: bool) -> None:
        """Decide until nothing is left to decide; where nothing happened, only now and then, as a sign of life is due."""
        now = time.monotonic()
        quiet = not (prompted or self._dead or self._stuck or self._holder)
        if self._roster.failed or (quiet and now < self._next_ping):
            return
        self._next_ping = now + min(1.0, self._options.shard_timeout_s / 4)
        for _ in range(10):
            began = time.monotonic()
            seen = self._observe()
            decisions = policy.decide(seen, self._rules)
            if not decisions:
                break
            for decision in decisions:
                self._carry_out(decision, seen, began)
            if self._roster.failed:
                return
        self._stuck = False
        self._fill_standbys()

    def _observe(self) -> policy.Seen:
        answers = self._crew.ask(self._alive(), dict.fromkeys(self._alive(), Describe()), min(_ASK_S, self._options.shard_timeout_s))
        now, shards = time.monotonic(), []
        for index, hired in enumerate(self._shards):
            answer = answers.get(index)
            if isinstance(answer, ShardLost):
                self._gone.add(hired)
            elif isinstance(answer, StepTimeout):
                log.warning("shard %d gave no sign of life for %g s and is replaced", index, self._options.shard_timeout_s)
                self._gone.add(hired)
            shards.append(self._seen(hired, answer))
        described = [answer for answer in answers.values() if isinstance(answer, Description)]
        self._check_holder(described, now)
        for answer in described:
            for rank, incarnation in answer.newest.items():
                self._newest[rank] = max(self._newest.get(rank, 0), incarnation)
        return policy.Seen(
            shards=shards,
            dead={rank: now - since for rank, (_, since) in self._dead.items()},
            held=self._holder is not None,
            stuck=self._stuck,
            members=frozenset(described[0].members if described else ()),
            asking=frozenset(self._asking),
            source=self._initial is not None or self._directory is not None,
            changed=self._changed or next((answer.changed for answer in described if answer.changed and self._changed), None),
            given_up=frozenset(self._given_up),
        )

    def _seen(self, hired: Hired, answer: Any) -> policy.ShardSeen:
        standby = self._standbys.get(hired.index)
        if not isinstance(answer, Description):
            if hired in self._gone:
                self._crew.fence(hired)  # what it had sent to its standby is all there then
            reached = self._crew.ask({0: standby}, {0: None}, 5.0)[0] if standby is not None else None
            return policy.ShardSeen(hired not in self._gone, standby=reached if isinstance(reached, int) else None)
        return policy.ShardSeen(True, answer.epoch, answer.epoch_reason, answer.round, answer.schedule, answer.changed, answer.replicated)

    def _check_holder(self, described: Sequence[Description], now: float) -> None:
        """Let go of shards that somebody has held for too long without reading or writing files: that one is dead."""
        holders = {answer.holder for answer in described if answer.holder is not None}
        token = next(iter(sorted(holders)), None)
        busy = any(answer.busy for answer in described)
        if token is None or busy:
            self._holder = None
        elif self._holder is None or self._holder[0] != token:
            self._holder = (token, now)
        elif now - self._holder[1] > self._options.step_timeout_s:
            log.warning("the shards were held for %g s by somebody who is gone; letting go", now - self._holder[1])
            self._crew.ask(self._alive(), dict.fromkeys(self._alive(), Release(token)), _ASK_S)
            self._holder = None
            self._stuck = len({answer.round for answer in described}) > 1

    def _alive(self) -> dict[int, Hired]:
        return {index: hired for index, hired in enumerate(self._shards) if hired not in self._gone}

    # What is decided

    def _carry_out(self, decision: policy.Decision, seen: policy.Seen, began: float) -> None:
        log.info("supervisor: %s", decision)
        if isinstance(decision, policy.Promote):
            self._promote(decision, seen)
            self._recovered("promoted", began)
        elif isinstance(decision, policy.Rewind):
            self._rewind(decision, seen)
            self._recovered("rewound", began)
        elif isinstance(decision, policy.Complete):
            self._reign(max(s.epoch for s in seen.shards), next(s.schedule for s in seen.shards if s.epoch == decision.epoch))
        elif isinstance(decision, policy.Depart):
            self._depart(decision, seen)
        elif isinstance(decision, policy.Admit):
            self._admit(decision, seen)
        elif isinstance(decision, policy.GiveUp):
            self._given_up |= set(decision.ranks)
            for rank in decision.ranks:
                self._ask_all(GiveUp(rank))
        else:
            log.error("supervisor: %s", decision.why)
            self._publish(failed=decision.why)

    def _promote(self, decision: policy.Promote, seen: policy.Seen) -> None:
        epoch = max(shard.epoch for shard in seen.shards) + 1
        schedule = next((shard.schedule for shard in seen.shards if shard.alive), ())
        reign = Reign(epoch, schedule, dict(self._newest))
        for index in decision.shards:
            log.warning("shard %d died; its standby takes over", index)
            self._crew.fence(self._shards[index])
            standby = self._standbys.pop(index)
            try:
                self._shards[index] = self._crew.promote(standby, reign, near=list(self._alive().values()))
            except DistNadamError as error:
                log.warning("the standby of shard %d cannot take over: %s", index, error)
                self._gone.add(standby)
                return
        self._reign(epoch, schedule)

    def _reign(self, epoch: int, schedule: Schedule) -> None:
        self._ask_all(Reign(epoch, schedule, dict(self._newest)))
        self._publish()

    def _rewind(self, decision: policy.Rewind, seen: policy.Seen) -> None:
        """Make what is gone anew, and have all shards load the newest checkpoint that all of them can read."""
        log.warning("%s: all shards go back to the last checkpoint", decision.why)
        for index in sorted({*decision.shards, *(i for i, hired in enumerate(self._shards) if hired in self._gone)}):
            self._crew.fence(self._shards[index])
            self._shards[index] = self._crew.hire(self._spec(index), standby=False, near=list(self._alive().values()))
            self._crew.watch(self._shards[index])
        epoch = max(shard.epoch for shard in seen.shards)
        schedule = next((shard.schedule for shard in seen.shards if shard.alive), ())
        for source in self._sources():
            epoch += 1
            answers = self._crew.ask(self._alive(), self._loads(source, epoch, schedule), _LOAD_S)
            errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
            if not errors and len(answers) == len(self._shards):
                self._stuck, self._changed, self._bad = False, None, set()
                self._publish()
                return
            if any(isinstance(error, (ShardLost, StepTimeout)) for error in errors):
                return  # another death: look again
            log.warning("passing over %s: %s", source, errors[0])
        self._publish(failed=f"{decision.why}, and no checkpoint under {self._directory} can be loaded")

    def _sources(self) -> list[Path | Flat]:
        found: list[Path | Flat] = []
        if self._directory is not None:
            found += list(reversed(store.steps(Path(self._directory))))
        return found + ([self._initial] if self._initial is not None else [])

    def _loads(self, source: Path | Flat, epoch: int, schedule: Schedule) -> dict[int, Any]:
        common = {"schedule": schedule, "newest": dict(self._newest)}
        if not isinstance(source, Path):
            return {i: Load(epoch, params=cut_flat(source, spec.ranges), **common) for i, spec in enumerate(self._specs)}
        try:
            manifest = store.load(source)
        except CheckpointError as error:
            log.warning("passing over %s", error)
            return {}
        raw, leftovers = manifest.to_bytes(), leftover_readers(manifest, len(self._specs))
        return {i: Load(epoch, str(source), raw, tuple(left), **common) for i, left in enumerate(leftovers)}

    def _depart(self, decision: policy.Depart, seen: policy.Seen) -> None:
        """Let ranks leave from the first round that no shard can have begun without them."""
        log.warning("ranks %s leave; the others go on", ", ".join(map(str, decision.ranks)))
        first = max(shard.round for shard in seen.shards) + 1
        self._set_members(first, tuple(sorted(seen.members - set(decision.ranks))), seen)
        self.recoveries.departed += len(decision.ranks)

    def _admit(self, decision: policy.Admit, seen: policy.Seen) -> None:
        """Take ranks in between two rounds, the same two on every shard."""
        log.info("ranks %s join", ", ".join(map(str, decision.ranks)))
        everyone = self._alive()
        held = self._crew.ask(everyone, dict.fromkeys(everyone, Hold(_ADMIN)), self._options.step_timeout_s)
        try:
            if not all(hasattr(answer, "round") for answer in held.values()):
                return
            rounds = {answer.round for answer in held.values()}
            self._set_members(max(rounds) + 1, tuple(sorted(seen.members | set(decision.ranks))), seen)
        finally:
            self._crew.ask(everyone, dict.fromkeys(everyone, Release(_ADMIN)), _ASK_S)

    def _set_members(self, first: int, ranks: tuple[int, ...], seen: policy.Seen) -> None:
        newest = max(seen.shards, key=lambda shard: shard.epoch)
        kept = tuple(entry for entry in newest.schedule if entry[0] < first)
        self._reign(newest.epoch + 1, (*kept, (first, ranks)))

    def _settle(self, rank: int, incarnation: int) -> None:
        """Refuse a dead worker from now on, and see its last push through where a shard has counted it."""
        everyone = self._alive()
        joins = self._crew.ask(everyone, dict.fromkeys(everyone, Join(rank, incarnation + 1, reserve=True)), _ASK_S)
        joined = {index: answer for index, answer in joins.items() if isinstance(answer, Joined)}
        if len(joined) < len(joins):
            return  # somebody has taken it over already, who does the same; or a shard died, which comes first
        adopted = self._crew.ask(everyone, adoptions(rank, joined), _ASK_S)
        self._stuck = self._stuck or any(isinstance(answer, IllegalMessage) for answer in adopted.values())

    # Standbys

    def _fill_standbys(self) -> None:
        """See to it that every shard has a standby that follows it; new processes are made beside the watch."""
        if self._replicas == 0:
            return
        described = self._crew.ask(self._alive(), dict.fromkeys(self._alive(), Describe()), _ASK_S)
        for index, answer in described.items():
            if not isinstance(answer, Description) or answer.replicated is not None or index in self._filling:
                continue
            standby = self._standbys.get(index)
            if standby is None:
                self._filling.add(index)
                self._hirer.submit(self._hire_standby, index, list(self._alive().values()))
            else:
                attached = self._crew.ask(self._alive(), {index: Attach(standby)}, _LOAD_S)[index]
                if isinstance(attached, Exception):
                    log.warning("shard %d: its standby could not be filled: %s", index, str(attached).splitlines()[-1])
                    self._crew.fence(self._standbys.pop(index))

    def _hire_standby(self, index: int, near: list[Hired]) -> None:
        hired = None
        try:
            hired = self._crew.hire(self._spec(index), standby=True, near=near)
        except DistNadamError as error:
            log.warning("no standby for shard %d can be had: %s", index, error)
            time.sleep(1.0)
        self._events.put(("hired", (index, hired)))

    def _spec(self, index: int) -> ShardSpec:
        """Return the spec of a shard with the learning rate that the living ones have now."""
        answers = self._crew.ask(self._alive(), dict.fromkeys(self._alive(), Describe()), _ASK_S)
        rates = [answer.lr for answer in answers.values() if isinstance(answer, Description)]
        spec = self._specs[index]
        return replace(spec, config=spec.config.with_lr(rates[0])) if rates else spec

    def _ask_all(self, message: Any) -> None:
        self._crew.ask(self._alive(), dict.fromkeys(self._alive(), message), _ASK_S)

    def _recovered(self, how: str, began: float) -> None:
        setattr(self.recoveries, how, getattr(self.recoveries, how) + 1)
        self.recoveries.seconds.append(time.monotonic() - began)

    def _publish(self, failed: str | None = None) -> None:
        with self._lock:
            self._roster = Roster(max(time.time_ns(), self._roster.version + 1), tuple(self._shards), failed)
            ready = [future for newer_than, future in self._waiting if self._roster.version > newer_than]
            self._waiting = []
        for future in ready:
            if not future.done():
                future.set_result(self._roster)


def require_alive(roster: Roster) -> Roster:
    """Return the roster; raise Unrecoverable where the supervisor has given up."""
    if roster.failed is not None:
        raise Unrecoverable(roster.failed)
    return roster
