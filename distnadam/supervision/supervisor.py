"""The one who decides, for all shards at once, what happens when processes die: watches, observes, asks `policy`, has it carried out.

One supervisor per optimizer. Everything it must know it can read again from the shards, so a successor goes on where a dead one stopped.
"""

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from distnadam import policy
from distnadam.arrays import Flat
from distnadam.layout import Ranges
from distnadam.messages import Description, Release, ShardSpec
from distnadam.supervision.board import Board
from distnadam.supervision.crew import Crew, Hired, Roster
from distnadam.supervision.fleet import ASK_S, Fleet
from distnadam.supervision.recovery import Recovery
from distnadam.supervision.source import Source
from distnadam.transitions import Phase

log = logging.getLogger("distnadam")

TICK_S = 0.2
"""Seconds between two looks while something is awaited."""
_IDLE_S = 1.0
_ROUNDS_OF_DECISIONS = 10


class Supervisor:
    """See the module. `adopt` gives it its shards, `begin` starts the watch; every other method may be called from any thread.

    Args:
        specs: the shards'.
        replicas: standbys per shard, 0 or 1.
        crew: what reaches and makes processes.
    """

    def __init__(self, specs: Sequence[ShardSpec], replicas: int, crew: Crew) -> None:
        options = specs[0].options
        self._replicas, self._options = replicas, options
        self._rules = policy.Rules(options.rejoin_timeout_s, options.min_workers)
        self._fleet = Fleet(specs, crew)
        self._source = Source(options.checkpoint_dir, retain_initial=options.retain_initial)
        self._recovery = Recovery(self._fleet, self._source, self._publish, lambda what, about: self._events.put((what, about)))
        self._asking: set[int] = set()
        self._holder: tuple[str, float] | None = None
        self._uneven: tuple[tuple[int, ...], float] | None = None
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._board = Board()
        self._closed = self._begun = False
        self._next_look = 0.0
        self._thread: threading.Thread | None = None

    # What others tell and ask

    def adopt(self, shards: Sequence[Hired], standbys: Mapping[int, Hired], gone: Sequence[Hired] = ()) -> None:
        """Take processes that were made already; nobody is told of them before those that are gone have been replaced."""
        self._fleet.shards, self._fleet.standbys, self._fleet.gone = list(shards), dict(standbys), set(gone)
        if not gone:
            self._publish(None)

    def begin(self, *, initial: Flat | None, directory: str | None) -> None:
        """Start the watch over shards that have their state: from parameters with nothing behind them, or from a checkpoint.

        Told again, as by a call that seemed lost, or of a successor that watches already, it only takes what can be gone back to.
        """
        self._source.begin(initial, directory)
        with self._lock:
            begun, self._begun = self._begun, True
        if begun:
            return
        for hired in (*self._fleet.alive().values(), *self._fleet.standbys.values()):
            self._fleet.crew.watch(hired)
        self._recovery.let_go()
        for answer in self._fleet.describe().values():  # as an earlier supervisor knew
            if isinstance(answer, Description):
                self._source.directory = self._source.directory or answer.saved
                for rank in answer.dead:
                    self._on_died_rank(rank, answer.newest[rank])
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()
        self._events.put(("look", None))

    def died(self, hired: Hired) -> None:
        """Take that a process ended."""
        self._events.put(("died", (hired,)))

    def outdated(self, standby: Hired) -> None:
        """Take that a primary goes on without its standby, which must not step in for it from now on."""
        self._fleet.outdated.add(standby)
        self._events.put(("outdated", (standby,)))

    def notice(self, what: str, rank: int, incarnation: int) -> None:
        """Take what a shard says of a rank or of its standby."""
        self._events.put((what, (rank, incarnation)))

    def changing(self, what: str) -> None:
        """Take that the state is about to be replaced from outside, which going back to the last checkpoint would lose."""
        self._source.change(what)

    def changes(self) -> int:
        """Return a number that is another one after every change from outside."""
        return self._source.changes

    def saved(self, root: str, changes: int) -> None:
        """Take that a checkpoint is complete under this directory, of when `changes` was that number."""
        self._source.saved(root, changes)

    def roster(self, newer_than: int, suspect: bool = False) -> Future[Roster]:
        """Return the roster once there is one newer than what the caller has seen; with a suspicion, after a look, whatever it finds."""
        future = self._board.newer(newer_than)
        if suspect:
            self._events.put(("suspect", future))
        return future

    def lost_ranks(self) -> dict[int, int]:
        """Return the ranks whose worker died and that nobody has taken over, and the incarnation that died."""
        return {rank: incarnation for rank, (incarnation, _) in dict(self._fleet.dead).items()}

    def recoveries(self) -> dict[str, int]:
        """Return how many shards were taken over by standbys, how often all went back, how many ranks left or were
        taken over."""
        return dict(self._recovery.counts)

    def specs(self) -> list[ShardSpec]:
        """Return the shards' specs."""
        return list(self._fleet.specs)

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> Future[None]:
        """Have so many shards hold these ranges from the next round on; the future carries what prevented it."""
        future: Future[None] = Future()
        self._events.put(("reshard", (num_shards, cuts, future)))
        return future

    def close(self) -> None:
        """Stop watching, and end every process: at once, lest a look waits for one that is stopped, and those that it was about to make."""
        self._closed = True
        self._events.put(("look", None))
        self._fleet.crew.dismiss(*self._fleet.shards, *self._fleet.standbys.values())
        if self._thread is not None:
            self._thread.join()
        self._recovery.close()
        self._fleet.crew.dismiss(*self._fleet.shards, *self._fleet.standbys.values())

    # The watch

    def _run(self) -> None:
        while not self._closed:
            events = self._drain()
            for what, about in events:
                self._take(what, about)
            try:
                self._look(prompted=bool(events))
            except Exception as error:
                log.exception("supervisor")
                self._publish(f"the supervisor could not recover: {type(error).__name__}: {error}")
            for what, about in events:
                if what == "suspect" and not about.done() and self._board.now.shards:
                    about.set_result(self._board.now)

    def _drain(self) -> list[tuple[str, Any]]:
        events = []
        while not (self._fleet.crew.in_charge() or self._closed):
            time.sleep(TICK_S)
        try:
            events.append(self._events.get(timeout=TICK_S))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _take(self, what: str, about: Any) -> None:
        if what not in ("look", "suspect", "standby lost"):  # those only prompt a look
            getattr(self, f"_on_{what.replace(' ', '_')}")(*about)

    def _on_died(self, hired: Hired) -> None:
        self._fleet.gone.add(hired)
        if self._fleet.standbys.get(hired.index) == hired:
            del self._fleet.standbys[hired.index]

    def _on_outdated(self, standby: Hired) -> None:
        self._on_died(standby)
        self._fleet.crew.dismiss(standby)

    def _on_joined(self, rank: int, incarnation: int) -> None:
        self._fleet.joined(rank, incarnation)
        if rank in self._fleet.dead and incarnation > self._fleet.dead[rank][0]:
            del self._fleet.dead[rank]
            self._recovery.counts["rejoined"] += 1
        self._asking.add(rank)

    def _on_left(self, rank: int, incarnation: int) -> None:
        self._asking.discard(rank)
        if self._rules.min_workers is not None and self._fleet.newest.get(rank, 0) == incarnation:
            self._fleet.dead.setdefault(rank, (incarnation, time.monotonic()))  # it is as gone as if it had died

    def _on_stuck(self, _: int, __: int) -> None:
        self._fleet.stuck = True

    def _on_hired(self, *about: Any) -> None:
        self._recovery.take_standby(*about)

    def _on_attached(self, *about: Any) -> None:
        self._recovery.take_attached(*about)

    def _on_reshard(self, num_shards: int, cuts: Sequence[Ranges], future: Future[None]) -> None:
        try:
            self._recovery.reshard(num_shards, cuts)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _on_died_rank(self, rank: int, incarnation: int) -> None:
        if self._fleet.newest.get(rank, 0) > incarnation or rank in self._fleet.dead:
            return  # taken over already, or told by another shard
        self._fleet.dead[rank] = (incarnation, time.monotonic())
        self._asking.discard(rank)
        log.warning("worker %d died; a new worker(%d) may take the rank over within %g s", rank, rank, self._rules.rejoin_timeout_s)
        self._recovery.settle(rank)

    def _look(self, *, prompted: bool) -> None:
        """Decide until nothing is left to decide; where nothing happened, only as often as a sign of life is due."""
        now = time.monotonic()
        quiet = not (prompted or self._fleet.dead or self._fleet.stuck or self._holder or self._uneven)
        if self._board.now.failed or (quiet and now < self._next_look):
            return
        self._next_look = now + min(_IDLE_S, self._options.shard_timeout_s / 4)
        for _ in range(_ROUNDS_OF_DECISIONS):
            seen = self._observe()
            decisions = policy.decide(seen, self._rules)
            if self._closed:
                return
            if not decisions or not self._fleet.crew.in_charge():
                break
            for decision in decisions:
                self._recovery.carry_out(decision, seen)
            if self._board.now.failed:
                return
        if self._replicas:
            self._recovery.fill_standbys()

    # What it sees

    def _observe(self) -> policy.Seen:
        fleet, now = self._fleet, time.monotonic()
        answers = fleet.describe(min(ASK_S, self._options.shard_timeout_s))
        shards = [self._seen(hired, answers.get(index)) for index, hired in enumerate(fleet.shards)]
        described = [answer for i, answer in answers.items() if isinstance(answer, Description) and fleet.shards[i] not in fleet.gone]
        self._check_holder(described, now)
        return policy.Seen(
            shards=shards,
            dead={rank: now - since for rank, (_, since) in fleet.dead.items()},
            held=self._holder is not None,
            stuck=fleet.stuck or any(answer.phase == Phase.HOLLOW.value for answer in described),
            members=frozenset(described[0].members if described else ()),
            asking=frozenset(self._asking),
            source=self._source.present,
            changed=self._source.changed or next((d.changed for d in described if d.changed is not None), None),
            given_up=frozenset.intersection(*(frozenset(d.given_up) for d in described)) if described else frozenset(),
        )

    def _seen(self, hired: Hired, answer: Any) -> policy.ShardSeen:
        fleet, reached = self._fleet, None
        if isinstance(answer, Description) and hired not in fleet.gone:
            told = (answer.epoch, answer.epoch_reason, answer.round, answer.schedule, answer.replicated, answer.changed)
            return policy.ShardSeen(True, *told)
        if hired in fleet.gone:
            fleet.crew.fence(hired)  # what it had sent to its standby is all there then
            if (standby := fleet.standbys.get(hired.index)) is not None and standby not in fleet.outdated:
                reached = fleet.crew.ask({0: standby}, {0: None}, ASK_S)[0]
        return policy.ShardSeen(hired not in fleet.gone, standby=reached if isinstance(reached, int) else None)

    def _check_holder(self, described: Sequence[Description], now: float) -> None:
        """Let go of shards whose holder has died, or has held them for too long without reading or writing files.

        Where that leaves them at different rounds and none moves, a step from outside reached some of them only: all must go back.
        """
        rounds = tuple(answer.round for answer in described)
        if self._uneven is not None and (self._uneven[0] != rounds or len(set(rounds)) == 1):
            self._uneven = None
        elif self._uneven is not None and now - self._uneven[1] > self._options.shard_timeout_s:
            self._fleet.stuck, self._uneven = True, None
        token = min((answer.holder for answer in described if answer.holder is not None), default=None)
        if token is None or any(answer.busy for answer in described):
            self._holder = None
        elif self._holder is None or self._holder[0] != token:
            self._holder = (token, now)
        elif self._fleet.crew.has_ended(token) or now - self._holder[1] > self._options.step_timeout_s:
            log.warning("the shards were held for %g s by somebody who is gone; letting go", now - self._holder[1])
            self._fleet.ask_all(Release(token))
            self._holder, self._uneven = None, (rounds, now)

    def _publish(self, failed: str | None) -> None:
        self._board.publish(self._fleet.shards, failed)
