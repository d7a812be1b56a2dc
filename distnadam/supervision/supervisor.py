"""The one who decides, for all shards at once, what happens when processes die: watches, observes,
asks `policy`, has it carried out.

One supervisor per optimizer. Everything it must know it can read again from the shards, so a
successor goes on where a dead one stopped.
"""

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from distnadam.protocol.messages import Description, ShardSpec
from distnadam.supervision import policy
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.executor import DecisionExecutor
from distnadam.supervision.observer import Observer
from distnadam.supervision.process_manager import ProcessManager, ShardProcess
from distnadam.supervision.restore_points import RestorePoints
from distnadam.supervision.shard_map import ShardMap, ShardMapPublisher
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges

log = logging.getLogger("distnadam")

TICK_S = 0.2
"""Seconds between two looks while something is awaited."""
_IDLE_S = 1.0
_ROUNDS_OF_DECISIONS = 10


class Supervisor:
    """See the module. `adopt` gives it its shards, `begin` starts the watch; every other method may
    be called from any thread.

    Args:
        specs: the shards'.
        replicas: standbys per shard, 0 or 1.
        crew: what reaches and makes processes.
    """

    def __init__(
        self, specs: Sequence[ShardSpec], replicas: int, processes: ProcessManager
    ) -> None:
        options = specs[0].options
        self._replicas, self._options = replicas, options
        self._rules = policy.Rules(options.rejoin_timeout_s, options.min_workers)
        self._cluster = ClusterState(specs, processes)
        self._source = RestorePoints(options.checkpoint_dir, retain_initial=options.retain_initial)
        self._recovery = DecisionExecutor(
            self._cluster,
            self._source,
            self._publish,
            lambda what, about: self._events.put((what, about)),
        )
        self._observer = Observer(self._cluster, self._source, options, self._on_died_rank)
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._publisher = ShardMapPublisher()
        self._closed = self._begun = False
        self._next_look = 0.0
        self._thread: threading.Thread | None = None

    # What others tell and ask

    def adopt(
        self,
        shards: Sequence[ShardProcess],
        standbys: Mapping[int, ShardProcess],
        gone: Sequence[ShardProcess] = (),
    ) -> None:
        """Take processes that were made already; nobody is told of them before those that are gone
        have been replaced.
        """
        self._cluster.shards, self._cluster.standbys, self._cluster.gone = (
            list(shards),
            dict(standbys),
            set(gone),
        )
        if not gone:
            self._publish(None)

    def begin(self, *, initial: Flat | None, directory: str | None) -> None:
        """Start the watch over shards that have their state: from parameters with nothing behind
        them, or from a checkpoint.

        Told again, as by a call that seemed lost, or of a successor that watches already, it only
        takes what can be gone back to.
        """
        with self._lock:
            begun, self._begun = self._begun, True
        if begun:
            self._source.begin(initial, directory)
            return
        self.resync(initial=initial, directory=directory)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()
        self._events.put(("look", None))

    def resync(self, *, initial: Flat | None, directory: str | None) -> None:
        """Watch the processes, and learn from them what an earlier supervisor knew."""
        self._source.begin(initial, directory)
        for process in (*self._cluster.alive().values(), *self._cluster.standbys.values()):
            self._cluster.processes.watch(process)
        self._recovery.release()
        for answer in self._cluster.describe().values():
            if isinstance(answer, Description):
                self._source.directory = self._source.directory or answer.saved
                for rank in answer.dead:
                    self._on_died_rank(rank, answer.newest[rank])

    def died(self, process: ShardProcess) -> None:
        """Take that a process ended."""
        self._events.put(("died", (process,)))

    def outdated(self, standby: ShardProcess) -> None:
        """Take that a primary goes on without its standby, which must not step in for it from now
        on.
        """
        self._cluster.outdated.add(standby)
        self._events.put(("outdated", (standby,)))

    def notice(self, what: str, rank: int, incarnation: int) -> None:
        """Take what a shard says of a rank or of its standby."""
        self._events.put((what, (rank, incarnation)))

    def changing(self, what: str) -> None:
        """Take that the state is about to be replaced from outside, which going back to the last
        checkpoint would lose.
        """
        self._source.change(what)

    def changes(self) -> int:
        """Return a number that is another one after every change from outside."""
        return self._source.changes

    def saved(self, root: str, changes: int) -> None:
        """Take that a checkpoint is complete under this directory, of when `changes` was that
        number.
        """
        self._source.saved(root, changes)

    def shard_map(self, newer_than: int, suspect: bool = False) -> Future[ShardMap]:
        """Return the roster once there is one newer than what the caller has seen; with a
        suspicion, after a look, whatever it finds.
        """
        future = self._publisher.newer(newer_than)
        if suspect:
            self._events.put(("suspect", future))
        return future

    def lost_ranks(self) -> dict[int, int]:
        """Return the ranks whose worker died and that nobody has taken over, and the incarnation
        that died.
        """
        return {rank: incarnation for rank, (incarnation, _) in dict(self._cluster.dead).items()}

    def recoveries(self) -> dict[str, int]:
        """Return how many shards were taken over by standbys, how often all went back, how many
        ranks left or were taken over.
        """
        return dict(self._recovery.counts)

    def standbys(self) -> dict[int, Any]:
        """Return the places of the standbys that there are, filled or not, by the index of their
        shard.
        """
        return {index: process.place for index, process in dict(self._cluster.standbys).items()}

    def specs(self) -> list[ShardSpec]:
        """Return the shards' specs."""
        return list(self._cluster.specs)

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> Future[None]:
        """Have so many shards hold these ranges from the next round on; the future carries what
        prevented it.
        """
        future: Future[None] = Future()
        self._events.put(("reshard", (num_shards, cuts, future)))
        return future

    def close(self) -> None:
        """Stop watching, and end every process: at once, lest a look waits for one that is stopped,
        and those that it was about to make.
        """
        self._closed = True
        self._events.put(("look", None))
        self._cluster.processes.terminate(*self._cluster.shards, *self._cluster.standbys.values())
        if self._thread is not None:
            self._thread.join()
        self._recovery.close()
        self._cluster.processes.terminate(*self._cluster.shards, *self._cluster.standbys.values())

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
                if what == "suspect" and not about.done() and self._publisher.now.shards:
                    about.set_result(self._publisher.now)

    def _drain(self) -> list[tuple[str, Any]]:
        events = []
        while not (self._cluster.processes.is_leader() or self._closed):
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

    def _on_died(self, process: ShardProcess) -> None:
        self._cluster.gone.add(process)
        if self._cluster.standbys.get(process.index) == process:
            del self._cluster.standbys[process.index]

    def _on_outdated(self, standby: ShardProcess) -> None:
        self._on_died(standby)
        self._cluster.processes.terminate(standby)

    def _on_joined(self, rank: int, incarnation: int) -> None:
        self._cluster.joined(rank, incarnation)
        if rank in self._cluster.dead and incarnation > self._cluster.dead[rank][0]:
            del self._cluster.dead[rank]
            self._recovery.counts["rejoined"] += 1

    def _on_left(self, rank: int, incarnation: int) -> None:
        if self._rules.min_workers is not None and self._cluster.newest.get(rank, 0) == incarnation:
            self._cluster.dead.setdefault(
                rank, (incarnation, time.monotonic())
            )  # it is as gone as if it had died

    def _on_stuck(self, _: int, __: int) -> None:
        self._cluster.stuck = True

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
        known = self._cluster.dead.get(rank, (0, 0.0))[0]
        if self._cluster.newest.get(rank, 0) > max(incarnation, known) or known >= incarnation:
            return  # taken over already, or told by another shard
        self._cluster.dead[rank] = (incarnation, time.monotonic())
        log.warning(
            "worker %d died; a new worker(%d) may take the rank over within %g s",
            rank,
            rank,
            self._rules.rejoin_timeout_s,
        )
        self._recovery.settle(rank)

    def _look(self, *, prompted: bool) -> None:
        """Decide until nothing is left to decide; where nothing happened, only as often as a sign
        of life is due.
        """
        now = time.monotonic()
        quiet = not (prompted or self._cluster.dead or self._cluster.stuck or self._observer.awaits)
        if self._publisher.now.failed or (quiet and now < self._next_look):
            return
        self._next_look = now + min(_IDLE_S, self._options.shard_timeout_s / 4)
        for _ in range(_ROUNDS_OF_DECISIONS):
            seen = self._observer.look()
            decisions = policy.decide(seen, self._rules)
            if self._closed:
                return
            if not decisions or not self._cluster.processes.is_leader():
                break
            for decision in decisions:
                self._recovery.execute(decision, seen)
            if self._publisher.now.failed:
                return
        if self._replicas:
            self._recovery.fill_standbys()

    def _publish(self, failed: str | None) -> None:
        self._publisher.publish(self._cluster.shards, failed)
