"""Executes the policy's decisions on the processes. It decides nothing: what it finds on its way is
left to the next look.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from distnadam.errors import DistNadamError, IllegalMessage, ShardLost, StepTimeout
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Description, Join, Joined, Resume, ShardSpec, WorkerDied
from distnadam.protocol.orphaned_push import orphaned_pushes
from distnadam.protocol.supervisor_messages import (
    AbandonRank,
    Load,
    MembershipHistory,
    Reconfigure,
)
from distnadam.shard.phases import Phase
from distnadam.supervision import decisions
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.events import StandbyFilled, StandbyStarted
from distnadam.supervision.observer import TOKEN
from distnadam.supervision.pause import all_paused
from distnadam.supervision.policy import Observation
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.resharding import Resharding, ask_all_or_raise, reshard
from distnadam.supervision.restore_points import RestorePoints
from distnadam.supervision.standby_starter import StandbyStarter
from distnadam.tensors.layout import Ranges

log = logging.getLogger("distnadam")

_LOAD_S = 3600.0
_PAUSE_S = 5.0


class DecisionExecutor:
    """Executes decisions, in the supervisor's thread; standbys are started and filled beside it.

    Args:
        cluster: the processes, and what is known of them.
        restore_points: what can be gone back to.
        publish: publishes where the shards are now, or why there are none any more.
        report: takes `StandbyStarted` and `StandbyFilled`, from the executor's thread.
        beside: runs what must not hold up the supervisor.
    """

    def __init__(
        self,
        cluster: ClusterState,
        restore_points: RestorePoints,
        publish: Callable[[str | None], None],
        report: Callable[[StandbyStarted | StandbyFilled], None],
        beside: Executor,
    ) -> None:
        self._cluster = cluster
        self._restore_points = restore_points
        self._publish = publish
        self._standbys = StandbyStarter(cluster, report, beside)
        self._handed_over: set[ShardProcess] = set()
        self.counts = {"promoted": 0, "rewound": 0, "departed": 0, "rejoined": 0}

    def execute(self, decision: decisions.Decision, seen: Observation) -> None:
        """Execute what was decided on an observation."""
        log.info("supervisor: %s", decision)
        _EXECUTE[type(decision)](self, decision, seen)

    def _fail(self, decision: decisions.Fail, seen: Observation) -> None:
        log.error("supervisor: %s", decision.why)
        self._publish(decision.why)

    # Shards

    def _fence(self, decision: decisions.Fence, seen: Observation) -> None:
        for index in decision.shards:
            self._fence_process(self._cluster.shards[index])

    def _fence_process(self, process: ShardProcess) -> None:
        if process not in self._cluster.fenced:
            self._cluster.processes.fence(process)
            self._cluster.fenced.add(process)

    def _hand_over(self, decision: decisions.HandOver, seen: Observation) -> None:
        with self._between_rounds() as paused:
            if not paused:
                return
            for index in self._followed(decision.shards):
                process = self._cluster.shards[index]
                self._cluster.process_died(process)
                self._fence_process(process)
                self._handed_over.add(process)

    def _followed(self, shards: Sequence[int]) -> list[int]:
        """Return those of these paused shards that still can go: a standby may have died, or a save
        begun, since they were observed.
        """
        cluster = self._cluster
        answers = cluster.describe()
        followed = []
        for index in shards:
            standby, answer = cluster.standbys.get(index), answers.get(index)
            if standby is None or standby in cluster.stale or standby in cluster.dead:
                continue
            if isinstance(answer, Description) and answer.replicated is not None:
                followed += [] if answer.busy else [index]
        return followed

    def _promote(self, decision: decisions.Promote, seen: Observation) -> None:
        cluster = self._cluster
        epoch, schedule = cluster.next_epoch(), cluster.schedule
        alive = cluster.alive()  # of the dead, what was seen last may be of before a rewind
        for index in decision.shards:
            moves = cluster.shards[index] in self._handed_over
            self._handed_over.discard(cluster.shards[index])
            log.log(
                logging.INFO if moves else logging.WARNING,
                "shard %d, round %d: its process %s; its standby takes over",
                index,
                cluster.highest_round,
                "leaves its host" if moves else "died",
            )
            self.counts["promoted"] += not moves  # a move recovers from nothing
            standby = cluster.standbys.pop(index)
            if (successor := cluster.successors.pop(index, None)) is not None:
                if seen.shards[index].by_successor:
                    standby, successor = successor, standby
                cluster.processes.terminate(successor)  # whichever it is, its primary is gone
            reconfigure = Reconfigure(
                epoch=epoch,
                schedule=schedule,
                newest=dict(cluster.newest),
                config=cluster.config if alive else None,
                revision=cluster.revision,
            )
            try:
                cluster.shards[index] = cluster.processes.promote(
                    standby, reconfigure, near=list(cluster.alive().values())
                )
            except DistNadamError as error:
                log.warning("the standby of shard %d cannot take over: %s", index, error)
                self._fence_process(standby)
                return
        self._reconfigure(epoch, schedule)

    def _complete(self, decision: decisions.Complete, seen: Observation) -> None:
        newest = next(shard for shard in seen.shards if shard.epoch == decision.epoch)
        self._reconfigure(decision.epoch, newest.schedule)

    def _complete_config(self, decision: decisions.CompleteConfig, seen: Observation) -> None:
        shards = ", ".join(map(str, decision.shards))
        log.warning("shard %s missed a replacement of the configuration, and gets it", shards)
        self._reconfigure(self._cluster.next_epoch(), self._cluster.schedule, self._cluster.config)
        with suppress(DistNadamError):  # its author has no answer that this breaks
            self._restore_points.replacement_completed(seen.known.begun)

    def _release_hold(self, decision: decisions.ReleaseHold, seen: Observation) -> None:
        log.warning("the shards were held by %s, which is gone; they go on", decision.token)
        self._cluster.ask_all(Resume(decision.token))

    def _reconfigure(
        self, epoch: int, schedule: MembershipHistory, config: NadamConfig | None = None
    ) -> None:
        cluster = self._cluster
        newest, revision = dict(cluster.newest), cluster.revision
        order = Reconfigure(
            epoch=epoch, schedule=schedule, newest=newest, config=config, revision=revision
        )
        cluster.ask_all(order)
        self._publish(None)

    def _rewind(self, decision: decisions.Rewind, seen: Observation) -> None:
        """Start dead shards again; have all load the newest restore point that all can read."""
        cluster = self._cluster
        log.warning(
            "round %d: %s; all shards go back to the last checkpoint",
            cluster.highest_round,
            decision.why,
        )
        for index in decision.shards:
            for known in (cluster.standbys, cluster.successors):
                if (standby := known.pop(index, None)) is not None:
                    self._fence_process(standby)  # it must not step in for the new shard
        for index in decision.shards:
            near = list(cluster.alive().values())
            spec = cluster.specs[index]
            process = cluster.processes.start(spec, standby=False, near=near)
            cluster.shards[index] = process
            cluster.processes.watch(process)
        epoch = cluster.next_epoch()
        candidates = seen.known.candidates(undoing=decision.undoing)
        for point in candidates:
            load = Load(
                epoch=epoch,
                schedule=cluster.schedule,
                newest=dict(cluster.newest),
                live_owners=dict(cluster.live_owners),
                highest_round=cluster.highest_round,
                config=cluster.config,
            )
            epoch += 1
            answers = cluster.ask(self._restore_points.loads(point, cluster.specs, load), _LOAD_S)
            errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
            if any(isinstance(error, (ShardLost, StepTimeout)) for error in errors):
                return  # another death: look again
            if not errors and len(answers) == len(cluster.shards):
                lost = self._restore_points.gone_back(point)
                cluster.cannot_complete = False
                self.counts["rewound"] += 1
                self._publish(None if lost is None else f"{decision.why}, and {lost} meanwhile")
                return
            if errors:
                log.warning("passing over %s: %s", point, errors[0])
        tried = ", ".join(map(str, candidates)) or "nothing"
        self._publish(f"{decision.why}, and nothing to go back to can be loaded, of {tried}")

    def reshard(self, cuts: Sequence[Ranges]) -> None:
        """Have new shards of these ranges take the state over; the present ones go on if it fails.

        Raises:
            ClusterError: no process can be started, or a present shard died or did not pause.
            StaleEpoch: the state was replaced before the shards paused.
        """
        cluster = self._cluster
        if [spec.ranges for spec in cluster.specs] == list(cuts):
            return  # asked again, after an answer that was lost
        if missing := cluster.missing():
            raise StepTimeout(
                f"reshard: shard {', '.join(map(str, missing))} is dead and not replaced yet; try "
                "again"
            )

        def replaced(specs: Sequence[ShardSpec], shards: Sequence[ShardProcess]) -> None:
            standbys.extend(cluster.all_standbys())
            cluster.replace(specs, shards)
            self._publish(None)
            for process in shards:
                cluster.processes.watch(process)

        standbys: list[ShardProcess] = []
        what = Resharding(
            token=TOKEN,
            specs=cluster.specs,
            shards=cluster.shards,
            cuts=cuts,
            epoch=cluster.epoch,
            newest=cluster.newest,
            pause_s=_PAUSE_S,
        )
        try:
            reshard(cluster.processes, what, replaced)
        finally:
            cluster.processes.terminate(*standbys)

    # Ranks

    def _report_workers_died(
        self, decision: decisions.ReportWorkersDied, seen: Observation
    ) -> None:
        for rank, incarnation in decision.workers:
            self._cluster.ask_all(WorkerDied(rank, incarnation))

    def _finish_dead_workers(
        self, decision: decisions.FinishDeadWorkers, seen: Observation
    ) -> None:
        for rank in decision.ranks:
            self._finish_dead_worker(rank)

    def _finish_dead_worker(self, rank: int) -> bool:
        """Refuse a dead worker from now on; complete its last push if a shard has counted it.

        Return False if that cannot be now: somebody has taken the rank over, who does the same, or
        a shard died, which comes first. Where the push cannot be completed, all must go back.
        """
        cluster = self._cluster
        if rank not in cluster.dead_ranks:
            return False
        incarnation = cluster.dead_ranks[rank].incarnation + 1
        join = Join(rank=rank, incarnation=incarnation, reserve=True)
        joins = cluster.ask_all(join)
        joined = {index: answer for index, answer in joins.items() if isinstance(answer, Joined)}
        if len(joined) < len(cluster.shards):
            died = len(joins) < len(cluster.shards) or any(
                isinstance(answer, (ShardLost, StepTimeout)) for answer in joins.values()
            )
            if not died:
                cluster.worker_finished(rank)  # by the worker that has taken the rank over
            return False
        adopted = cluster.ask(orphaned_pushes(rank, joined)).values()
        if any(isinstance(answer, IllegalMessage) for answer in adopted):
            cluster.cannot_complete = True
        if not any(isinstance(answer, (ShardLost, StepTimeout)) for answer in adopted):
            cluster.worker_finished(rank)
        return not any(isinstance(answer, Exception) for answer in adopted)

    def _depart(self, decision: decisions.Depart, seen: Observation) -> None:
        ranks = decision.ranks
        log.warning("ranks %s leave; the others go on", ", ".join(map(str, ranks)))
        with self._between_rounds() as paused:
            if paused and all(self._finish_dead_worker(rank) for rank in ranks):
                self._set_members(tuple(sorted(seen.members - set(ranks))))
                self.counts["departed"] += len(ranks)

    def _admit(self, decision: decisions.Admit, seen: Observation) -> None:
        log.info("ranks %s join", ", ".join(map(str, decision.ranks)))
        with self._between_rounds() as paused:
            if paused:
                self._set_members(tuple(sorted(seen.members | set(decision.ranks))))

    def _abandon_ranks(self, decision: decisions.AbandonRanks, seen: Observation) -> None:
        lost = self._cluster.lost_ranks
        for rank in sorted(lost.keys() & set(decision.ranks)):
            self._cluster.ask_all(AbandonRank(rank, lost[rank]))

    @contextmanager
    def _between_rounds(self) -> Iterator[bool]:
        """Pause all shards where they are; yield False if one cannot be paused now.

        Late ones stay late: the round that they lack may await the very worker that is dead.
        """
        cluster = self._cluster

        def ask(messages: Mapping[int, Any]) -> dict[int, Any]:
            return ask_all_or_raise(cluster.processes, cluster.shards, messages, _PAUSE_S)

        pause = all_paused(
            ask, cluster.ask, TOKEN, len(cluster.shards), may_lag=lambda newest: True
        )
        with ExitStack() as stack:
            try:
                stack.enter_context(pause)
            except DistNadamError as error:
                log.info("the shards cannot be paused now: %s", error)
                yield False
            else:
                yield True

    def _set_members(self, ranks: tuple[int, ...]) -> None:
        """Have these ranks from the first round on that no paused shard has begun.

        A shard's coming round may have all its pushes already, and await norms.
        """
        cluster = self._cluster
        described = [
            answer for answer in cluster.describe().values() if isinstance(answer, Description)
        ]
        if len(described) == len(cluster.shards):
            begun = max(
                answer.round + (answer.phase != Phase.COLLECTING.value) for answer in described
            )
            kept = tuple(entry for entry in cluster.schedule if entry[0] <= begun)
            self._reconfigure(cluster.epoch + 1, (*kept, (begun + 1, ranks)))

    # Standbys

    def _drop_standbys(self, decision: decisions.DropStandbys, seen: Observation) -> None:
        self._standbys.drop(self._cluster.standbys, decision.shards)

    def _drop_successors(self, decision: decisions.DropSuccessors, seen: Observation) -> None:
        self._standbys.drop(self._cluster.successors, decision.shards)

    def _start_standbys(self, decision: decisions.StartStandbys, seen: Observation) -> None:
        self._standbys.start(decision.shards)

    def _fill_standbys(self, decision: decisions.FillStandbys, seen: Observation) -> None:
        self._standbys.fill(decision.shards)


_EXECUTE: dict[type, Callable[[DecisionExecutor, Any, Observation], None]] = {
    decisions.Fence: DecisionExecutor._fence,
    decisions.Promote: DecisionExecutor._promote,
    decisions.Rewind: DecisionExecutor._rewind,
    decisions.Complete: DecisionExecutor._complete,
    decisions.CompleteConfig: DecisionExecutor._complete_config,
    decisions.ReleaseHold: DecisionExecutor._release_hold,
    decisions.ReportWorkersDied: DecisionExecutor._report_workers_died,
    decisions.FinishDeadWorkers: DecisionExecutor._finish_dead_workers,
    decisions.DropStandbys: DecisionExecutor._drop_standbys,
    decisions.DropSuccessors: DecisionExecutor._drop_successors,
    decisions.StartStandbys: DecisionExecutor._start_standbys,
    decisions.FillStandbys: DecisionExecutor._fill_standbys,
    decisions.HandOver: DecisionExecutor._hand_over,
    decisions.Depart: DecisionExecutor._depart,
    decisions.Admit: DecisionExecutor._admit,
    decisions.AbandonRanks: DecisionExecutor._abandon_ranks,
    decisions.Fail: DecisionExecutor._fail,
}
