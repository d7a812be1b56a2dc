"""Watches all processes of one optimizer: takes events, observes, asks `policy`, executes.

One supervisor per optimizer. Everything that it must know it can read again from the shards, or,
where they may be gone too, from its memory, so a successor goes on where a dead one stopped.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_events import (
    CannotComplete,
    RankDied,
    RankJoined,
    RankLeft,
    StandbyLost,
)
from distnadam.supervision import policy
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.events import (
    Event,
    LookNow,
    ProcessDied,
    ReshardRequested,
    ShardSuspected,
    StandbyFilled,
    StandbyStale,
    StandbyStarted,
)
from distnadam.supervision.executor import DecisionExecutor
from distnadam.supervision.observer import Observer
from distnadam.supervision.process_manager import ProcessManager, ShardProcess
from distnadam.supervision.restore_points import RestoreMemory, RestorePoints
from distnadam.supervision.shard_map import ShardMap, ShardMapPublisher, require_alive
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges
from distnadam.threads import start

log = logging.getLogger("distnadam")

TICK_S = 0.2
"""Seconds between two looks while something is awaited."""
_IDLE_S = 1.0
_MOST_PASSES = 10


class Supervisor:
    """The supervisor of one optimizer.

    `manage` gives it its processes and `begin` starts the watch in a thread of its own; without
    `begin`, `run_once` makes one pass in the caller's thread. Any thread may call the other
    methods. `cluster`, `restore_points` and `recoveries` are to be read.

    Args:
        specs: the shards', in order.
        replicas: standbys per shard, 0 or 1.
        processes: starts, reaches and ends processes.
        memory: keeps what can be gone back to for a successor; None where none comes.
        beside: starts and fills standbys beside the watch; a thread by default.
        clock: returns seconds.
    """

    def __init__(
        self,
        specs: Sequence[ShardSpec],
        replicas: int,
        processes: ProcessManager,
        *,
        memory: RestoreMemory | None = None,
        beside: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = specs[0].options
        self.cluster = ClusterState(specs, processes, clock)
        self.restore_points = RestorePoints(
            options.checkpoint_dir, retain_initial=options.retain_initial, memory=memory
        )
        self._options = options
        self._rules = policy.Rules(
            rejoin_timeout_s=options.rejoin_timeout_s,
            min_workers=options.min_workers,
            replicas=replicas,
        )
        self._clock = clock
        self._beside = beside or ThreadPoolExecutor(1, "standbys")
        self._executor = DecisionExecutor(
            self.cluster, self.restore_points, self._publish, self.notify, self._beside
        )
        self._observer = Observer(self.cluster, self.restore_points, options)
        self._events: queue.Queue[Event] = queue.Queue()
        self._lock = threading.Lock()
        self._publisher = ShardMapPublisher()
        self._begun = False
        self._closed = False
        self._next_look = 0.0
        self._thread: threading.Thread | None = None

    # What others report and ask

    def manage(
        self,
        shards: Sequence[ShardProcess],
        standbys: Mapping[int, ShardProcess],
        dead: Sequence[ShardProcess] = (),
    ) -> None:
        """Supervise these processes; nothing is published before dead ones have been replaced."""
        self.cluster.shards = list(shards)
        self.cluster.standbys = dict(standbys)
        self.cluster.dead = set(dead)
        if not dead:
            self._publish(None)

    def begin(self, *, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        """Start the watch over shards that have their state.

        Idempotent: once watching, only records the restore point.

        Args:
            initial: the parameters that the shards began with, by space.
            checkpoint: that they were restored from.
        """
        with self._lock:
            begun, self._begun = self._begun, True
        if begun:
            self.restore_points.begin(initial, checkpoint)
            return
        self.resync(initial=initial, checkpoint=checkpoint)
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        start(self._thread)
        self.notify(LookNow())

    def resync(self, *, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        """Watch the processes, and learn from them what an earlier supervisor knew."""
        self.restore_points.begin(initial, checkpoint)
        for process in (*self.cluster.alive().values(), *self.cluster.all_standbys()):
            self.cluster.processes.watch(process)
        self.cluster.describe()  # a reshard may come before the first look

    def notify(self, event: Event) -> None:
        """Take an event; the supervisor looks soon."""
        self._events.put(event)

    def standby_is_stale(self, standby: ShardProcess) -> None:
        """Never promote this standby, from now on: its primary goes on without it."""
        self.cluster.stale.add(standby)
        self.notify(StandbyStale(standby=standby))

    def shard_map(self, newer_than: int, suspect: bool = False) -> Future[ShardMap]:
        """Return the map once it is newer than that version; with `suspect`, after the next look.

        Args:
            newer_than: the version that the caller has; 0 for none.
            suspect: whether the caller met a shard that does not answer.
        """
        future = self._publisher.newer(newer_than)
        if suspect:
            self.notify(ShardSuspected(answer=future))
        return future

    @property
    def newest_map(self) -> ShardMap:
        """The newest map."""
        return self._publisher.now

    @property
    def recoveries(self) -> dict[str, int]:
        """How many shards were promoted, how often all went back, how many ranks left or joined."""
        return dict(self._executor.counts)

    @property
    def shard_recoveries(self) -> int:
        """How many shards were promoted, and how often all went back."""
        return self._executor.counts["promoted"] + self._executor.counts["rewound"]

    def reshard(self, cuts: Sequence[Ranges]) -> Future[None]:
        """Have one shard per entry hold these ranges; the future carries what prevented it."""
        done: Future[None] = Future()
        self.notify(ReshardRequested(cuts=cuts, done=done))
        return done

    def close(self) -> None:
        """Stop watching, and end every process.

        Processes are ended at once, so that a look does not wait for a stopped one, and again after
        the last look, which may have started some.
        """
        self._closed = True
        self.notify(LookNow())
        self._terminate_all()
        if self._thread is not None:
            self._thread.join()
        self._beside.shutdown(cancel_futures=True)
        self._terminate_all()

    def _terminate_all(self) -> None:
        cluster = self.cluster
        cluster.processes.terminate(*cluster.shards, *cluster.all_standbys())

    # The watch

    def run_once(self, timeout_s: float = 0.0) -> None:
        """Make one pass: handle the events, then look, decide and execute until nothing is left.

        Without an event a look is made only when it is due.

        Args:
            timeout_s: how long to wait for a first event.

        Raises:
            Exception: what looking or executing raised; it is published as a failure before.
        """
        events = self._drain(timeout_s)
        for event in events:
            self._handle_or_fail(event)
        try:
            self._recover(prompted=bool(events))
        except Exception as error:
            self._publish(f"the supervisor could not recover: {type(error).__name__}: {error}")
            raise
        finally:
            for event in events:
                if isinstance(event, ShardSuspected) and self._publisher.now.shards:
                    _answer(event.answer, self._publisher.now)

    @property
    def has_events(self) -> bool:
        """Whether events wait for the next pass."""
        return not self._events.empty()

    def _watch(self) -> None:
        while not self._closed:
            try:
                if self.cluster.processes.is_leader():
                    self.run_once(TICK_S)
                else:
                    time.sleep(TICK_S)
            except Exception:
                log.exception("supervisor: a pass of the watch failed")  # `run_once` published it

    def _drain(self, timeout_s: float) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._events.get(block=timeout_s > 0, timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _handle_or_fail(self, event: Event) -> None:
        """Handle an event; an error ends recovery by name, never the thread.

        What the event said is lost, so whatever is decided afterwards could be wrong.
        """
        try:
            self._handle(event)
        except Exception as error:
            log.exception("supervisor: %s could not be handled", event)
            self._publish(
                f"the supervisor could not handle {type(event).__name__}: "
                f"{type(error).__name__}: {error}"
            )

    def _handle(self, event: Event) -> None:
        """Remember what an event says; what is done about it is decided after the next look."""
        cluster = self.cluster
        match event:
            case ProcessDied(process=process):
                cluster.process_died(process)
            case RankJoined() | RankLeft() | RankDied():
                self._take_rank(event)
            case CannotComplete():
                cluster.cannot_complete = True
            case StandbyStarted():
                self._take_standby(event)
            case StandbyFilled():
                self._take_filled(event)
            case ReshardRequested(cuts=cuts, done=done):
                self._reshard(cuts, done)
            case StandbyLost() | StandbyStale() | ShardSuspected() | LookNow():
                pass  # a look shows it

    def _take_rank(self, event: RankJoined | RankLeft | RankDied) -> None:
        cluster = self.cluster
        if isinstance(event, RankDied):
            cluster.worker_died(event.rank, event.incarnation)
        elif isinstance(event, RankJoined):
            if cluster.worker_joined(event.rank, event.incarnation):
                self._executor.counts["rejoined"] += 1
        elif self._rules.min_workers is not None:
            cluster.worker_left(event.rank, event.incarnation)

    def _take_standby(self, event: StandbyStarted) -> None:
        cluster, process = self.cluster, event.process
        if event.layout_generation != cluster.layout_generation:
            if process is not None:
                cluster.processes.terminate(process)  # of a shard that is no more
            return
        cluster.filling.discard(event.index)
        if process is not None:
            cluster.add_standby(process)
            cluster.processes.watch(process)

    def _take_filled(self, event: StandbyFilled) -> None:
        cluster = self.cluster
        if event.layout_generation != cluster.layout_generation:
            return
        index = event.standby.index
        cluster.filling.discard(index)
        is_successor = cluster.successors.get(index) == event.standby
        if event.error is None and is_successor:
            relieved = cluster.standbys[index]
            cluster.drop_standby(relieved)  # its successor is the standby now
            cluster.processes.terminate(relieved)
        elif event.error is not None:
            (cluster.unfilled if is_successor else cluster.stale).add(event.standby)
            log.warning(
                "shard %d: its standby could not be filled: %s",
                index,
                str(event.error).splitlines()[-1],
            )

    def _reshard(self, cuts: Sequence[Ranges], done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return  # the caller cancelled it
        try:
            require_alive(self._publisher.now)
            self._executor.reshard(cuts)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _recover(self, *, prompted: bool) -> None:
        """Look, decide and execute until nothing is left to decide."""
        cluster, now = self.cluster, self._clock()
        waiting = cluster.dead_ranks or cluster.cannot_complete or self._observer.awaits
        if self._publisher.now.failed or not (prompted or waiting or now >= self._next_look):
            return
        self._next_look = now + min(_IDLE_S, self._options.shard_timeout_s / 4)
        cluster.forget_gone()
        for _ in range(_MOST_PASSES):
            seen = self._observer.look()
            decisions = policy.decide(seen, self._rules)
            if self._closed or not decisions or not cluster.processes.is_leader():
                return
            for decision in decisions:
                self._executor.execute(decision, seen)
            if self._publisher.now.failed:
                return

    def _publish(self, failed: str | None) -> None:
        cluster = self.cluster
        cuts = [spec.ranges for spec in cluster.specs]
        self._publisher.publish(cluster.shards, cuts, failed)


def _answer(future: Future[ShardMap], answer: ShardMap) -> None:
    if not future.done():
        future.set_result(answer)
