"""What a supervisor sees each time it looks, as `policy` takes it.

It asks and remembers for how long something has been so; what is done about it is decided by
`policy`, and nothing here acts on a shard or a process.
"""

from collections.abc import Sequence
from typing import Any

from distnadam.config import Options
from distnadam.protocol.messages import Description
from distnadam.protocol.supervisor_messages import DescribeStandby
from distnadam.shard.phases import Phase
from distnadam.supervision import policy
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.restore_points import RestorePoints

TOKEN = "supervisor"
"""The token by which a supervisor itself pauses shards."""

_MOMENT_S = 0.5
"""Seconds for which a caller may hold all shards before it is waited out, and not queued with."""


class Observer:
    """Looks at all shards of one optimizer.

    Args:
        cluster: the processes, and what is known of them.
        restore_points: what can be gone back to.
        options: for how long what may last.
    """

    def __init__(
        self, cluster: ClusterState, restore_points: RestorePoints, options: Options
    ) -> None:
        self._cluster = cluster
        self._restore_points = restore_points
        self._options = options
        self._holder: tuple[str, float] | None = None
        self._uneven: tuple[tuple[int, ...], float] | None = None
        self._rounds: tuple[int, ...] = ()

    @property
    def awaits(self) -> bool:
        """Whether the mere passing of time may change what is decided."""
        return self._holder is not None or self._uneven is not None

    def look(self) -> policy.Observation:
        """Ask every shard for its status and return what is to be decided on."""
        cluster, now = self._cluster, self._cluster.clock()
        known, answers = self._restore_points.known, self._describe()
        shards = [
            self._observe(process, answers.get(index))
            for index, process in enumerate(cluster.shards)
        ]
        described = [  # in the shards' order, whichever answered first: two looks are compared
            answer
            for index, answer in sorted(answers.items())
            if isinstance(answer, Description) and cluster.shards[index] not in cluster.dead
        ]
        expired = self._expired_hold(described, now)
        held = self._holder is not None and expired is None
        uneven = self._uneven_for_long(described, now, held=held)
        empty = any(answer.phase == Phase.EMPTY.value for answer in described)
        members = frozenset(described[0].members if described else ())
        given_up = [frozenset(each.given_up) for each in described]
        return policy.Observation(
            shards=shards,
            dead={rank: now - worker.since for rank, worker in cluster.dead_ranks.items()},
            unfinished=frozenset(
                rank for rank, worker in cluster.dead_ranks.items() if not worker.finished
            ),
            unreported=self._unreported_deaths(described),
            held=held,
            held_long=self._holder is not None and now - self._holder[1] > _MOMENT_S,
            expired_hold=expired,
            cannot_complete=cluster.cannot_complete or uneven or empty,
            members=members,
            asking=frozenset(cluster.live_owners) - members,
            has_restore_point=bool(known.points),
            would_lose=known.would_lose,
            undoing_would_lose=known.undoing_would_lose,
            given_up=frozenset.intersection(*given_up) if given_up else frozenset(),
            highest_round=cluster.highest_round,
            known=known,
        )

    def _describe(self) -> dict[int, Any]:
        """Ask all shards, again as long as hyper-parameters are being replaced meanwhile: one may
        have answered before, another after.
        """
        before: dict[int, int] | None = None
        while True:
            answers = self._cluster.describe()
            now = {i: a.revision for i, a in answers.items() if isinstance(a, Description)}
            if len(set(now.values())) < 2 or now == before:
                return answers
            before = now

    def _observe(self, process: ShardProcess, answer: Any) -> policy.ShardObservation:
        cluster = self._cluster
        standby = cluster.standbys.get(process.index)
        successor = cluster.successors.get(process.index)
        stale = standby is not None and standby in cluster.stale
        filling = process.index in cluster.filling
        if isinstance(answer, Description) and process not in cluster.dead:
            return policy.ShardObservation(
                alive=True,
                epoch=answer.epoch,
                reason=answer.epoch_reason,
                round=answer.round,
                schedule=answer.schedule,
                standby=answer.replicated,
                has_standby=standby is not None,
                has_successor=successor is not None,
                successor_unfilled=successor is not None and successor in cluster.unfilled,
                filling=filling,
                stale=stale,
                revision=answer.revision,
                applied_revision=answer.applied_revision,
                leaves=cluster.processes.is_to_leave(process),
                busy=answer.busy,
                standby_leaves=standby is not None and cluster.processes.is_to_leave(standby),
            )
        if process not in cluster.dead:
            # it refuses to say where it stands, or whether its standby follows: start no other
            return policy.ShardObservation(
                alive=True, has_standby=standby is not None, filling=True
            )
        reached, by_successor = None, False
        if process in cluster.fenced:
            reached = None if stale else self._reached(standby)
            if reached is None:  # it was detached already, once its successor followed
                reached = self._reached(successor)
                by_successor = reached is not None
        return policy.ShardObservation(
            alive=False,
            fenced=process in cluster.fenced,
            standby=reached,
            by_successor=by_successor,
            has_standby=standby is not None,
            filling=filling,
            stale=stale,
        )

    def _reached(self, standby: ShardProcess | None) -> int | None:
        """Return the last round that a dead shard's standby has; None if it cannot take over."""
        if standby is None:
            return None
        ask = self._cluster.processes.ask
        answer = ask({0: standby}, {0: DescribeStandby()}, self._cluster.ask_s)[0]
        return answer if isinstance(answer, int) else None

    def _expired_hold(self, described: Sequence[Description], now: float) -> str | None:
        """Return the token of a holder that died, or holds for too long without files to handle.

        While the supervisor looks it holds nothing, so its own token is a predecessor's.
        """
        token = min(
            (answer.holder for answer in described if answer.holder is not None), default=None
        )
        if token is None and self._is_partial(described):
            return None
        if token is None:
            self._holder = None
            return None
        if any(answer.busy for answer in described):
            self._holder = (token, now)  # it handles files: no seconds count
            return None
        if self._holder is None or self._holder[0] != token:
            self._holder = (token, now)
            return token if token == TOKEN else None
        too_long = now - self._holder[1] > self._options.step_timeout_s
        expired = too_long or token == TOKEN or self._cluster.processes.is_dead(token)
        return token if expired else None

    def _uneven_for_long(self, described: Sequence[Description], now: float, *, held: bool) -> bool:
        """Whether some shards lack a direct step that others applied, and nobody brings it.

        A holder may be about to bring it; or it may wait for the same.
        """
        if self._is_partial(described):
            return False
        rounds = tuple(answer.round for answer in described)
        lacking = len(set(rounds)) > 1 and any(
            answer.stepped == answer.round == max(rounds) for answer in described
        )
        if not lacking or any(answer.busy for answer in described):
            self._uneven = None
        elif self._uneven is None or self._uneven[0] != rounds:
            self._uneven = (rounds, now)
        else:
            options = self._options
            patience_s = options.step_timeout_s / 2 if held else options.shard_timeout_s
            return now - self._uneven[1] > patience_s
        return False

    def _is_partial(self, described: Sequence[Description]) -> bool:
        """Whether a shard did not answer in time, as on a busy machine.

        What has lasted until now may last on, so such a look ends no count of seconds.
        """
        return len(described) < len(self._cluster.shards)

    def _unreported_deaths(self, described: Sequence[Description]) -> dict[int, int]:
        """Return awaited workers that are dead, where rounds do not go on.

        Not every worker has a connection whose end would say so.
        """
        cluster, before = self._cluster, self._rounds
        self._rounds = tuple(answer.round for answer in described)
        if self._rounds != before:
            return {}
        awaited = {rank for answer in described for rank in answer.waiting_for}
        return {
            rank: cluster.live_owners[rank][0]
            for rank in awaited & cluster.live_owners.keys() - cluster.dead_ranks.keys()
            if cluster.processes.is_dead(cluster.live_owners[rank][1])
        }
