"""The processes of one optimizer as its supervisor has them: shards, standbys, which of them are
gone, and how all are asked at once.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distnadam.errors import ShardLost, StepTimeout
from distnadam.protocol.shard_status import Describe, Description, Owners, ShardSpec
from distnadam.protocol.supervisor_messages import MembershipHistory
from distnadam.shard.phases import Phase
from distnadam.supervision.process_manager import ProcessManager, ShardProcess

_ASK_S = 60.0
"""Seconds in which a shard answers anything that does not wait for a round or a file."""


class ClusterState:
    """See the module.

    Args:
        specs: the shards'.
        crew: what reaches and makes processes.
    """

    def __init__(self, specs: Sequence[ShardSpec], processes: ProcessManager) -> None:
        self.specs, self.processes = list(specs), processes
        self.options = specs[0].options
        self.shards: list[ShardProcess] = []
        self.standbys: dict[int, ShardProcess] = {}
        self.gone: set[ShardProcess] = set()
        self.outdated: set[ShardProcess] = (
            set()
        )  # standbys whose primary has gone on without them, and which may not know
        self.newest: dict[int, int] = {}
        self.live_owners: Owners = {}
        self.highest_round = 0
        self.dead: dict[int, tuple[int, float]] = {}  # by rank: the worker that died, and when
        self.stuck = False
        self.epoch = 0
        self.schedule: MembershipHistory = ()

    @property
    def layout_generation(self) -> int:
        """How often the state was cut anew."""
        return self.specs[0].layout_generation

    def alive(self) -> dict[int, ShardProcess]:
        """Return the shards that are not known to be gone, by index."""
        return {
            index: process for index, process in enumerate(self.shards) if process not in self.gone
        }

    def missing(self) -> list[int]:
        """Return the indices of the shards that are gone."""
        return [index for index, process in enumerate(self.shards) if process in self.gone]

    @property
    def ask_s(self) -> float:
        """Seconds in which a shard that lives answers what takes no time."""
        return min(_ASK_S, self.specs[0].options.shard_timeout_s)

    def ask(self, messages: Mapping[int, Any], timeout_s: float | None = None) -> dict[int, Any]:
        """Send some living shards a message each; return their answers or errors."""
        return self.processes.ask(
            self.alive(), messages, self.ask_s if timeout_s is None else timeout_s
        )

    def ask_all(self, message: Any, timeout_s: float | None = None) -> dict[int, Any]:
        """Send every living shard a message; return their answers or errors."""
        return self.ask(dict.fromkeys(self.alive(), message), timeout_s)

    def describe(self) -> dict[int, Any]:
        """Return what the living shards say of themselves; those that died, broke, or are silent
        for too long, are gone from then on.
        """
        answers = self.ask_all(Describe())
        for index, answer in answers.items():
            if isinstance(answer, Description) and answer.phase != Phase.BROKEN.value:
                self._know(answer)
            elif isinstance(answer, (Description, ShardLost, StepTimeout)):
                self.gone.add(self.shards[index])
        described = [answer for answer in answers.values() if isinstance(answer, Description)]
        self.live_owners = owners(described) if described else self.live_owners
        for rank, (incarnation, _) in self.live_owners.items():
            if rank in self.dead and incarnation > self.dead[rank][0]:
                del self.dead[rank]  # somebody has taken it over
        return answers

    def _know(self, seen: Description) -> None:
        """Remember what must outlive all shards: the newest epoch and its membership, and each
        rank's newest worker.
        """
        if seen.epoch >= self.epoch:
            self.epoch, self.schedule = seen.epoch, seen.schedule
        for rank, incarnation in seen.newest.items():
            self.joined(rank, incarnation)
        self.highest_round = max(self.highest_round, seen.highest_round)

    def next_epoch(self) -> int:
        """Return an epoch later than any before; a successor that finds no shard alive takes it
        from the clock, far above any count.
        """
        return (self.epoch or int(time.time())) + 1

    def joined(self, rank: int, incarnation: int) -> None:
        """Take note of a rank's newest worker."""
        self.newest[rank] = max(self.newest.get(rank, 0), incarnation)

    def replace(self, specs: Sequence[ShardSpec], shards: Sequence[ShardProcess]) -> None:
        """Take other shards, with no standbys yet, in place of the present ones."""
        self.specs, self.shards, self.standbys = list(specs), list(shards), {}

    def spec(self, index: int) -> ShardSpec:
        """Return the spec of a shard with the learning rate that the living ones have now."""
        rates = [
            answer.lr
            for answer in self.ask_all(Describe()).values()
            if isinstance(answer, Description)
        ]
        spec = self.specs[index]
        return replace(spec, config=spec.config.with_lr(rates[0])) if rates else spec


def owners(described: Sequence[Description]) -> Owners:
    """Return the ranks that a living worker holds: where any shard knows of one, and none knows
    that it is gone, or of a newer one.
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
    here = {
        rank: held
        for each in described
        for rank, held in each.live_owners.items()
        if held[0] == newest[rank]
    }
    return {rank: held for rank, held in here.items() if rank not in gone}
