"""How each of the policy's decisions is carried out on the fleet. It decides nothing; what it finds
on its way is looked at anew.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from distnadam.checkpoint.storage.base import Directory
from distnadam.errors import DistNadamError, IllegalMessage, ShardLost, StepTimeout
from distnadam.protocol.messages import CatchUp, Description, Join, Joined, Pause, Paused, Resume
from distnadam.protocol.orphaned_push import adoptions
from distnadam.protocol.supervisor_messages import (
    AbandonRank,
    AttachStandby,
    Load,
    MembershipHistory,
    Reconfigure,
    Retire,
)
from distnadam.shard.phases import Phase
from distnadam.supervision import policy
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.restore_points import RestorePoints
from distnadam.tensors.layout import Ranges

log = logging.getLogger("distnadam")

_LOAD_S = 3600.0
_RETIRE_S = 60.0
"""Seconds in which a shard has copied what it was to save, before it lets go of its arrays."""
_HIRE_AGAIN_S = 1.0
_HOLD_S = 5.0
_TOKEN = "supervisor"


class DecisionExecutor:
    """See the module.

    Args:
        fleet: the processes.
        source: what can be gone back to.
        publish: tells everyone where the shards are now, or why there are none any more.
        report: told, from another thread, "hired" with the cutting, the index and the process of a
            new standby, None where none could be had, and "attached" with those of one that was
            filled, and the error where it could not be.
    """

    def __init__(
        self,
        cluster: ClusterState,
        source: RestorePoints,
        publish: Callable[[str | None], None],
        report: Callable[[str, Any], None],
    ) -> None:
        self._cluster, self._source, self._publish, self._report = cluster, source, publish, report
        self._starter = ThreadPoolExecutor(1, "hirer")
        self._filling: set[int] = set()
        self.counts = {"promoted": 0, "rewound": 0, "departed": 0, "rejoined": 0}

    def release(self) -> None:
        """Let go of shards that an earlier supervisor held when it died."""
        self._cluster.ask_all(Resume(_TOKEN))

    def close(self) -> None:
        """Hire nobody any more."""
        self._starter.shutdown(cancel_futures=True)

    def execute(self, decision: policy.Decision, seen: policy.Observation) -> None:
        """Do what was decided on what was seen."""
        log.info("supervisor: %s", decision)
        if isinstance(decision, policy.Promote):
            self._promote(decision)
        elif isinstance(decision, policy.Rewind):
            self._rewind(decision)
        elif isinstance(decision, policy.Complete):
            self._reconfigure(
                decision.epoch, next(s.schedule for s in seen.shards if s.epoch == decision.epoch)
            )
        elif isinstance(decision, policy.Depart):
            self._depart(decision, seen)
        elif isinstance(decision, policy.Admit):
            self._admit(decision, seen)
        elif isinstance(decision, policy.AbandonRanks):
            for rank in decision.ranks:
                self._cluster.ask_all(AbandonRank(rank, self._cluster.dead[rank][0]))
        else:
            log.error("supervisor: %s", decision.why)
            self._publish(decision.why)

    # Shards

    def _promote(self, decision: policy.Promote) -> None:
        cluster, epoch, schedule = self._cluster, self._cluster.next_epoch(), self._cluster.schedule
        for index in decision.shards:
            log.warning("shard %d died; its standby takes over", index)
            cluster.processes.fence(cluster.shards[index])
            standby = cluster.standbys.pop(index)
            reconfigure = Reconfigure(epoch=epoch, schedule=schedule, newest=dict(cluster.newest))
            try:
                cluster.shards[index] = cluster.processes.promote(
                    standby, reconfigure, near=list(cluster.alive().values())
                )
            except DistNadamError as error:
                log.warning("the standby of shard %d cannot take over: %s", index, error)
                cluster.processes.fence(standby)
                return
        self.counts["promoted"] += len(decision.shards)
        self._reconfigure(epoch, schedule)

    def _reconfigure(self, epoch: int, schedule: MembershipHistory) -> None:
        self._cluster.ask_all(
            Reconfigure(epoch=epoch, schedule=schedule, newest=dict(self._cluster.newest))
        )
        self._publish(None)

    def _rewind(self, decision: policy.Rewind) -> None:
        """Make what is gone anew, and have all shards load the newest checkpoint that all of them
        can read.
        """
        log.warning("%s: all shards go back to the last checkpoint", decision.why)
        cluster = self._cluster
        for index in cluster.missing():
            cluster.processes.fence(cluster.shards[index])
            if (outdated := cluster.standbys.pop(index, None)) is not None:
                cluster.processes.fence(outdated)  # it must not step in for the new one
        for index in cluster.missing():
            cluster.shards[index] = cluster.processes.start(
                cluster.spec(index), standby=False, near=list(cluster.alive().values())
            )
            cluster.processes.watch(cluster.shards[index])
        epoch, schedule = cluster.next_epoch(), cluster.schedule
        for candidate in self._source.candidates():
            known = {
                "schedule": schedule,
                "newest": dict(cluster.newest),
                "live_owners": dict(cluster.live_owners),
                "highest_round": cluster.highest_round,
            }
            loads = self._source.loads(candidate, cluster.specs, epoch, **known)
            epoch += 1
            answers = cluster.ask(loads, _LOAD_S)
            errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
            if any(isinstance(error, (ShardLost, StepTimeout)) for error in errors):
                return  # another death: look again
            if not errors and len(answers) == len(cluster.shards):
                self._source.changed, cluster.stuck = None, False
                self.counts["rewound"] += 1
                self._publish(None)
                return
            for error in errors[:1]:
                log.warning(
                    "passing over %s: %s",
                    candidate if isinstance(candidate, Directory) else "the first parameters",
                    error,
                )
        self._publish(
            f"{decision.why}, and no checkpoint under {self._source.directory} can be loaded"
        )

    # Ranks

    def settle(self, rank: int) -> bool:
        """Refuse a dead worker from now on, and see its last push through where a shard has counted
        it, or have all go back.

        Return False where that is not for now: somebody has taken the rank over, who does the same,
        or a shard died, which comes first.
        """
        cluster = self._cluster
        joins = cluster.ask_all(
            Join(rank=rank, incarnation=cluster.dead[rank][0] + 1, reserve=True)
        )
        joined = {index: answer for index, answer in joins.items() if isinstance(answer, Joined)}
        if len(joined) < len(cluster.shards):
            return False
        adopted = cluster.ask(adoptions(rank, joined))
        cluster.stuck = cluster.stuck or any(
            isinstance(answer, IllegalMessage) for answer in adopted.values()
        )
        return not any(isinstance(answer, Exception) for answer in adopted.values())

    def _depart(self, decision: policy.Depart, seen: policy.Observation) -> None:
        log.warning("ranks %s leave; the others go on", ", ".join(map(str, decision.ranks)))
        with self._between_rounds() as held:
            if held and all(self.settle(rank) for rank in decision.ranks):
                self._set_members(tuple(sorted(seen.members - set(decision.ranks))))
                self.counts["departed"] += len(decision.ranks)

    def _admit(self, decision: policy.Admit, seen: policy.Observation) -> None:
        log.info("ranks %s join", ", ".join(map(str, decision.ranks)))
        with self._between_rounds() as held:
            if held:
                self._set_members(tuple(sorted(seen.members | set(decision.ranks))))

    @contextmanager
    def _between_rounds(self) -> Iterator[bool]:
        """Hold all shards, shard 0 first as everybody does; False where somebody else has them, or
        one is gone: it is tried again.
        """
        cluster, held = self._cluster, True
        try:
            for indices in ([0], range(1, len(cluster.shards))):
                answers = (
                    cluster.ask({index: Pause(_TOKEN) for index in indices}, _HOLD_S)
                    if held
                    else {}
                )
                held = (
                    held
                    and len(answers) == len(indices)
                    and all(isinstance(answer, Paused) for answer in answers.values())
                )
            yield held
        finally:
            cluster.ask_all(Resume(_TOKEN))

    def _set_members(self, ranks: tuple[int, ...]) -> None:
        """Have these ranks from the first round on that no held shard has begun: it may have all
        its pushes, and await norms.
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

    def _level(self) -> bool:
        """Have the held shards that are behind complete the round that others have decided; return
        whether all stand at one round.
        """
        cluster = self._cluster
        rounds = {
            index: answer.round
            for index, answer in cluster.describe().items()
            if isinstance(answer, Description)
        }
        late = {
            index: CatchUp(_TOKEN, max(rounds.values()))
            for index, number in rounds.items()
            if number < max(rounds.values())
        }
        return len(rounds) == len(cluster.shards) and not any(cluster.ask(late, _HOLD_S).values())

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """Have new shards take the state over between two rounds; the old ones go on where that
        fails.

        Raises:
            ClusterError: no processes can be had for them, or an old one died meanwhile.
        """
        cluster, first = self._cluster, self._cluster.spec(0)
        if num_shards == len(cluster.shards):
            return  # asked again, after an answer that was lost
        layout_generation = first.layout_generation + 1
        specs = [
            replace(
                first,
                index=i,
                num_shards=num_shards,
                ranges=ranges,
                layout_generation=layout_generation,
            )
            for i, ranges in enumerate(cuts)
        ]
        new: list[ShardProcess] = []
        try:
            for spec in specs:
                new.append(
                    cluster.processes.start(
                        spec, standby=False, near=[*cluster.alive().values(), *new]
                    )
                )
            with self._between_rounds() as held:
                if not held or not self._level():
                    raise StepTimeout(
                        "reshard: the shards could not be held between two rounds; try again"
                    )
                old, ranges = list(cluster.shards), [spec.ranges for spec in cluster.specs]
                order = Load(epoch=cluster.epoch + 1, newest=dict(cluster.newest))
                for error in cluster.processes.move(_TOKEN, old, new, (ranges, cuts), order):
                    raise error
                cluster.processes.ask(
                    dict(enumerate(old)),
                    {index: Retire(order.epoch) for index in range(len(old))},
                    _RETIRE_S,
                )
                spare = [*old, *cluster.standbys.values()]
                cluster.replace(specs, new)
                self._filling = set()
                self._publish(None)  # not before the old ones are retired: see `recovered_topology`
        except BaseException:
            cluster.processes.terminate(*new)
            raise
        cluster.processes.terminate(*spare)
        for process in new:
            cluster.processes.watch(process)

    # Standbys

    def fill_standbys(self) -> None:
        """See to it that every shard has a standby that follows it; processes are made, and filled,
        beside the watch.
        """
        cluster = self._cluster
        for index, answer in cluster.describe().items():
            if (
                not isinstance(answer, Description)
                or answer.replicated is not None
                or index in self._filling
            ):
                continue
            self._filling.add(index)
            if (standby := cluster.standbys.get(index)) is None:
                self._starter.submit(
                    self._start_standby,
                    cluster.layout_generation,
                    index,
                    cluster.spec(index),
                    list(cluster.alive().values()),
                )
            else:
                self._starter.submit(
                    self._attach, cluster.layout_generation, index, cluster.shards[index], standby
                )

    def take_standby(
        self, layout_generation: int, index: int, process: ShardProcess | None
    ) -> None:
        """Take a new standby that was hired, to be filled; one for a shard that is no more is let
        go.
        """
        if layout_generation != self._cluster.layout_generation:
            if process is not None:
                self._cluster.processes.terminate(process)
            return
        self._filling.discard(index)
        if process is not None:
            self._cluster.standbys[index] = process
            self._cluster.processes.watch(process)

    def take_attached(
        self, layout_generation: int, index: int, standby: ShardProcess, error: Any
    ) -> None:
        """Take that a standby was filled, or could not be."""
        if layout_generation != self._cluster.layout_generation:
            return
        self._filling.discard(index)
        if isinstance(error, Exception):
            log.warning(
                "shard %d: its standby could not be filled: %s", index, str(error).splitlines()[-1]
            )
            if self._cluster.standbys.get(index) == standby:
                self._cluster.processes.fence(self._cluster.standbys.pop(index))

    def _start_standby(
        self, layout_generation: int, index: int, spec: Any, near: list[ShardProcess]
    ) -> None:
        process = None
        try:
            process = self._cluster.processes.start(spec, standby=True, near=near)
        except DistNadamError as error:
            log.warning("no standby for shard %d can be had: %s", index, error)
            time.sleep(_HIRE_AGAIN_S)
        self._report("hired", (layout_generation, index, process))

    def _attach(
        self, layout_generation: int, index: int, primary: ShardProcess, standby: ShardProcess
    ) -> None:
        answer = self._cluster.processes.ask(
            {index: primary}, {index: AttachStandby(standby)}, _LOAD_S
        ).get(index)
        self._report("attached", (layout_generation, index, standby, answer))
