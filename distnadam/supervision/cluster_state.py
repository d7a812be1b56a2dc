"""What a supervisor knows of its optimizer's processes and ranks, and how it asks all shards.

Knowledge only: it asks shards, remembers what they answer, and does nothing to a process. That a
process is dead is kept here and nowhere else: `dead` holds those that ended, broke or fell silent,
`fenced` those of them that can certainly do no harm any more. (A process manager knows beside that
whose end was reported while a call is under way.)
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distnadam.errors import ShardLost, StepTimeout
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Describe, Description, Owners, ShardSpec
from distnadam.protocol.supervisor_messages import MembershipHistory
from distnadam.shard.phases import Phase
from distnadam.supervision.process_manager import ProcessManager, ShardProcess

log = logging.getLogger("distnadam")

_ASK_S = 60.0
"""Seconds in which a shard answers anything that does not wait for a round or a file."""


@dataclass(frozen=True, kw_only=True)
class DeadWorker:
    """A worker that is gone and whose rank nobody has taken over.

    Args:
        incarnation: the worker's.
        since: when it was found to be gone, on the supervisor's clock.
        finished: whether all shards refuse it and its last push was seen to.
    """

    incarnation: int
    since: float
    finished: bool = False


class ClusterState:
    """The processes of one optimizer, as its supervisor knows them.

    Args:
        specs: the shards', in order.
        processes: reaches them.
        clock: returns seconds.
    """

    def __init__(
        self,
        specs: Sequence[ShardSpec],
        processes: ProcessManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.specs = list(specs)
        self.processes = processes
        self.clock = clock
        self.shards: list[ShardProcess] = []
        self.standbys: dict[int, ShardProcess] = {}
        self.successors: dict[int, ShardProcess] = {}
        """What is to replace standbys whose hosts are to be left, which follow until it does."""
        self.unfilled: set[ShardProcess] = set()
        """Successors that could not be filled, unless their primaries died just afterwards."""
        self.dead: set[ShardProcess] = set()
        self.fenced: set[ShardProcess] = set()
        self.stale: set[ShardProcess] = set()
        """Standbys whose primary went on without them, which they may not know."""
        self.filling: set[int] = set()
        """Shards whose standby is being started or filled."""
        self.newest: dict[int, int] = {}
        self.live_owners: Owners = {}
        self.dead_ranks: dict[int, DeadWorker] = {}
        self.highest_round = 0
        self.config: NadamConfig | None = None
        self.revision = 0
        self.cannot_complete = False
        self.epoch = 0
        self.schedule: MembershipHistory = ()

    @property
    def layout_generation(self) -> int:
        """How often the state was resharded."""
        return self.specs[0].layout_generation

    @property
    def ask_s(self) -> float:
        """Seconds in which a living shard answers what takes no time."""
        return min(_ASK_S, self.specs[0].options.shard_timeout_s)

    @property
    def lost_ranks(self) -> dict[int, int]:
        """The ranks whose worker is gone and not replaced, and that worker's incarnation."""
        return {rank: worker.incarnation for rank, worker in dict(self.dead_ranks).items()}

    def alive(self) -> dict[int, ShardProcess]:
        """Return the shards that are not known to be dead, by index."""
        return {
            index: process for index, process in enumerate(self.shards) if process not in self.dead
        }

    def all_standbys(self) -> list[ShardProcess]:
        """Return the standbys and what is to replace them."""
        return [*self.standbys.values(), *self.successors.values()]

    def missing(self) -> tuple[int, ...]:
        """Return the indices of the dead shards."""
        return tuple(index for index, process in enumerate(self.shards) if process in self.dead)

    def ask(self, messages: Mapping[int, Any], timeout_s: float | None = None) -> dict[int, Any]:
        """Send some living shards a message each; return their answers or errors."""
        return self.processes.ask(
            self.alive(), messages, self.ask_s if timeout_s is None else timeout_s
        )

    def ask_all(self, message: Any, timeout_s: float | None = None) -> dict[int, Any]:
        """Send every living shard a message; return their answers or errors."""
        return self.ask(dict.fromkeys(self.alive(), message), timeout_s)

    def describe(self) -> dict[int, Any]:
        """Ask all living shards for their status, remember the answers, and return them."""
        answers = self.ask_all(Describe())
        self.learn(answers)
        return answers

    def learn(self, answers: Mapping[int, Any]) -> None:
        """Remember shards' descriptions; those that died, broke or are silent count as dead."""
        for index, answer in answers.items():
            if isinstance(answer, Description) and answer.phase != Phase.BROKEN.value:
                self._learn_one(answer)
            elif isinstance(answer, (Description, ShardLost, StepTimeout)):
                self.dead.add(self.shards[index])
        described = [answer for answer in answers.values() if isinstance(answer, Description)]
        if not described:
            return
        newest = max(described, key=lambda answer: answer.revision)
        self.config, self.revision = newest.config, newest.revision
        self.live_owners = owners(described)
        for rank, (incarnation, _) in self.live_owners.items():
            if rank in self.dead_ranks and incarnation > self.dead_ranks[rank].incarnation:
                del self.dead_ranks[rank]
        for answer in described:
            for rank in set(answer.dead) - self.live_owners.keys() - self.dead_ranks.keys():
                self.worker_died(rank, answer.newest[rank])

    def _learn_one(self, seen: Description) -> None:
        """Remember what must outlive all shards."""
        if seen.epoch >= self.epoch:
            self.epoch = seen.epoch
            self.schedule = seen.schedule
        for rank, incarnation in seen.newest.items():
            # no sign of life: finishing a dead worker gives the next incarnation away
            self.newest[rank] = max(self.newest.get(rank, 0), incarnation)
        self.highest_round = max(self.highest_round, seen.highest_round)

    def next_epoch(self) -> int:
        """Return an epoch later than any before.

        A successor that finds no shard alive takes it from the clock, far above any count.
        """
        return (self.epoch or int(time.time())) + 1

    def worker_joined(self, rank: int, incarnation: int) -> bool:
        """Remember a rank's newest worker; return whether it replaces a dead one."""
        self.newest[rank] = max(self.newest.get(rank, 0), incarnation)
        if rank not in self.dead_ranks or incarnation <= self.dead_ranks[rank].incarnation:
            return False
        del self.dead_ranks[rank]
        return True

    def worker_left(self, rank: int, incarnation: int) -> None:
        """Remember that a rank's newest worker departed; its last step is whole."""
        if self.newest.get(rank, 0) == incarnation:
            self.dead_ranks.setdefault(
                rank, DeadWorker(incarnation=incarnation, since=self.clock(), finished=True)
            )

    def worker_died(self, rank: int, incarnation: int) -> None:
        """Remember that a worker died, unless a newer one has its rank or it is known."""
        known = self.dead_ranks[rank].incarnation if rank in self.dead_ranks else 0
        if self.newest.get(rank, 0) > max(incarnation, known) or known >= incarnation:
            return
        self.dead_ranks[rank] = DeadWorker(incarnation=incarnation, since=self.clock())
        log.warning(
            "worker %d died; a new worker(%d) may take the rank over within %g s",
            rank,
            rank,
            self.specs[0].options.rejoin_timeout_s,
        )

    def worker_finished(self, rank: int) -> None:
        """Remember that a dead worker is refused everywhere and its last push was seen to."""
        if rank in self.dead_ranks:
            self.dead_ranks[rank] = replace(self.dead_ranks[rank], finished=True)

    def process_died(self, process: ShardProcess) -> None:
        """Remember that a process ended; a dead standby is forgotten."""
        self.dead.add(process)
        self.drop_standby(process)

    def add_standby(self, process: ShardProcess) -> None:
        """Know a process as its shard's standby, or as the successor of the present one."""
        known = self.successors if process.index in self.standbys else self.standbys
        known[process.index] = process

    def drop_standby(self, process: ShardProcess | None) -> None:
        """Forget a standby, in whose place its successor steps, or a successor."""
        index = None if process is None else process.index
        if index is None:
            return
        if self.successors.get(index) == process:
            del self.successors[index]
        elif self.standbys.get(index) == process:
            del self.standbys[index]
            if index in self.successors:
                self.standbys[index] = self.successors.pop(index)

    def forget_gone(self) -> None:
        """Forget processes that are neither shards nor standbys any more: what Ray keeps of an
        actor lives as long as a handle does.
        """
        known = {*self.shards, *self.all_standbys()}
        for some in (self.dead, self.fenced, self.stale, self.unfilled):
            for process in list(some):  # another thread may add to it
                if process not in known:
                    some.discard(process)

    def replace(self, specs: Sequence[ShardSpec], shards: Sequence[ShardProcess]) -> None:
        """Know other shards, without standbys yet, in place of the present ones."""
        self.specs = list(specs)
        self.shards = list(shards)
        self.standbys = {}
        self.successors = {}
        self.filling = set()


def owners(described: Sequence[Description]) -> Owners:
    """Return the ranks that a living worker holds, merged from what shards know.

    A rank counts if any shard knows its worker, and none knows that it is gone or of a newer one.
    """
    newest: dict[int, int] = {}
    for each in described:
        newest |= {
            rank: number for rank, number in each.newest.items() if number > newest.get(rank, 0)
        }
    gone = {
        rank
        for each in described
        for rank in (*each.left, *each.dead)
        if each.newest.get(rank, 0) == newest[rank]
    }
    held = {
        rank: owner
        for each in described
        for rank, owner in each.live_owners.items()
        if owner[0] == newest[rank]
    }
    return {rank: owner for rank, owner in held.items() if rank not in gone}
