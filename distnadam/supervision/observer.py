"""What a supervisor sees of its optimizer each time it looks, as `policy` takes it; and who is
found to be gone on the way.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from distnadam.config import Options
from distnadam.protocol.messages import Description, Resume, WorkerDied
from distnadam.shard.phases import Phase
from distnadam.supervision import policy
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.restore_points import RestorePoints

log = logging.getLogger("distnadam")


class Observer:
    """See the module.

    Args:
        fleet: the processes.
        source: what can be gone back to.
        options: for how long what may be borne.
        on_died_rank: told a rank and its worker's incarnation where that one is found to have died.
    """

    def __init__(
        self,
        cluster: ClusterState,
        source: RestorePoints,
        options: Options,
        on_died_rank: Callable[[int, int], None],
    ) -> None:
        self._cluster, self._source, self._options, self._on_died_rank = (
            cluster,
            source,
            options,
            on_died_rank,
        )
        self._holder: tuple[str, float] | None = None
        self._uneven: tuple[tuple[int, ...], float] | None = None
        self._rounds: tuple[int, ...] = ()

    @property
    def awaits(self) -> bool:
        """Whether something may change by the mere passing of time."""
        return self._holder is not None or self._uneven is not None

    def look(self) -> policy.Observation:
        """Ask every shard where it stands, and return what is to be decided on."""
        cluster, now = self._cluster, time.monotonic()
        answers = cluster.describe()
        shards = [
            self._seen(process, answers.get(index)) for index, process in enumerate(cluster.shards)
        ]
        described = [
            answer
            for i, answer in answers.items()
            if isinstance(answer, Description) and cluster.shards[i] not in cluster.gone
        ]
        self._check_holder(described, now)
        self._check_steps(described, now)
        self._check_workers(described)
        members = frozenset(described[0].members if described else ())
        return policy.Observation(
            shards=shards,
            dead={rank: now - since for rank, (_, since) in cluster.dead.items()},
            held=self._holder is not None,
            stuck=cluster.stuck or any(answer.phase == Phase.EMPTY.value for answer in described),
            members=members,
            asking=frozenset(cluster.live_owners) - members,
            source=self._source.present,
            changed=self._source.changed
            or next((d.changed for d in described if d.changed is not None), None),
            given_up=frozenset.intersection(*(frozenset(d.given_up) for d in described))
            if described
            else frozenset(),
            highest_round=cluster.highest_round,
        )

    def _seen(self, process: ShardProcess, answer: Any) -> policy.ShardObservation:
        cluster, reached = self._cluster, None
        if isinstance(answer, Description) and process not in cluster.gone:
            told = (
                answer.epoch,
                answer.epoch_reason,
                answer.round,
                answer.schedule,
                answer.replicated,
                answer.changed,
            )
            return policy.ShardObservation(True, *told)
        if process in cluster.gone:
            cluster.processes.fence(process)  # what it had sent to its standby is all there then
            if (
                standby := cluster.standbys.get(process.index)
            ) is not None and standby not in cluster.outdated:
                reached = cluster.processes.ask({0: standby}, {0: None}, cluster.ask_s)[0]
        return policy.ShardObservation(
            process not in cluster.gone, standby=reached if isinstance(reached, int) else None
        )

    def _check_holder(self, described: Sequence[Description], now: float) -> None:
        """Let go of shards whose holder has died, or has held them for too long without reading or
        writing files.
        """
        token = min(
            (answer.holder for answer in described if answer.holder is not None), default=None
        )
        if token is None or any(answer.busy for answer in described):
            self._holder = None
        elif self._holder is None or self._holder[0] != token:
            self._holder = (token, now)
        elif (
            self._cluster.processes.is_dead(token)
            or now - self._holder[1] > self._options.step_timeout_s
        ):
            log.warning(
                "the shards were held for %g s by somebody who is gone; letting go",
                now - self._holder[1],
            )
            self._cluster.ask_all(Resume(token))
            self._holder = None

    def _check_steps(self, described: Sequence[Description], now: float) -> None:
        """Have all go back where some lack a step from outside that others have applied, and nobody
        brings it to them.

        Whoever holds the shards may be about to; or may wait for the same.
        """
        rounds = tuple(answer.round for answer in described)
        lacking = len(set(rounds)) > 1 and any(
            answer.stepped == answer.round == max(rounds) for answer in described
        )
        if not lacking or any(answer.busy for answer in described):
            self._uneven = None
        elif self._uneven is None or self._uneven[0] != rounds:
            self._uneven = (rounds, now)
        elif now - self._uneven[1] > (
            self._options.shard_timeout_s
            if self._holder is None
            else self._options.step_timeout_s / 2
        ):
            self._cluster.stuck, self._uneven = True, None

    def _check_workers(self, described: Sequence[Description]) -> None:
        """Where rounds do not go on, see whether those who are waited for are still there: not
        every worker has a line that would tell.
        """
        for answer in described:
            for rank in (
                set(answer.dead) - self._cluster.live_owners.keys() - self._cluster.dead.keys()
            ):
                self._on_died_rank(
                    rank, answer.newest[rank]
                )  # whoever was told so may have died since
        rounds, before = tuple(answer.round for answer in described), self._rounds
        self._rounds = rounds
        if rounds != before:
            return
        for rank in {
            rank for answer in described for rank in answer.waiting_for
        } & self._cluster.live_owners.keys() - self._cluster.dead.keys():
            incarnation, process = self._cluster.live_owners[rank]
            if self._cluster.processes.is_dead(process):
                self._cluster.ask_all(WorkerDied(rank, incarnation))
                self._on_died_rank(rank, incarnation)
