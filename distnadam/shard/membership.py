"""Who holds each rank of a shard's workers: incarnations, membership by round, who left, who died,
and whose push may count. Pure.
"""

from collections.abc import Collection, Mapping
from typing import Any

import distnadam.protocol.messages as msg
from distnadam.errors import (
    LatePush,
    LifecycleError,
    Reconfigured,
    RoundMismatch,
    SupersededWorker,
    WorkerLost,
)
from distnadam.protocol.messages import Owners
from distnadam.protocol.supervisor_messages import MembershipHistory
from distnadam.shard.epochs import Epochs
from distnadam.shard.ledger import Ledger

Numbered = msg.Push | msg.TotalNorms | msg.Step | msg.PushNote


class Membership:
    """The workers of one shard, and the ledger of what they had counted.

    Args:
        shard: the shard's index, for messages.
        num_workers: ranks.
    """

    def __init__(self, shard: int, num_workers: int) -> None:
        self._shard = shard
        self._num_workers = num_workers
        self.ledger = Ledger()
        self.schedule: MembershipHistory = ((1, tuple(range(num_workers))),)
        self.left: set[int] = set()
        self.dead: set[int] = set()
        self.given_up: set[int] = set()
        self.owners: Owners = {}

    def needed(self, number: int) -> tuple[int, ...]:
        """Return the ranks whose pushes make up a round."""
        first, ranks = self.schedule[-1]
        return (
            ranks
            if first <= number
            else next(ranks for first, ranks in reversed(self.schedule) if first <= number)
        )

    def join(self, message: msg.Join) -> int:
        """Give a rank to a worker, and return its incarnation.

        Raises:
            LifecycleError: there is no such rank.
            SupersededWorker: a newer worker has it, or another process the same number.
        """
        rank = message.rank
        self._check_rank(rank)
        admitted = self.ledger.admit(rank, message.incarnation)
        self.check_newest(rank, admitted)
        if (
            not message.reserve
            and self.owners.get(rank, (0, ""))[0] == admitted
            and self.owners[rank][1] != message.process
        ):
            why = "was given to another process too, by a shard that died since; join again"
            raise SupersededWorker(f"shard {self._shard}: rank {rank}: the number {admitted} {why}")
        if not message.reserve:
            self.owners[rank] = admitted, message.process
            for ranks in (self.left, self.dead, self.given_up):
                ranks.discard(rank)
        return admitted

    def taken_over(self, rank: int, incarnation: int) -> bool:
        """Whether a worker newer than that one has joined, not only had its place reserved."""
        return rank in self.owners and self.owners[rank][0] > incarnation

    @property
    def live_owners(self) -> Owners:
        """The ranks that a worker holds which has neither left, nor died, nor had its place
        reserved for another.
        """
        gone = self.left | self.dead
        return {
            rank: held
            for rank, held in self.owners.items()
            if held[0] == self.ledger.newest[rank] and rank not in gone
        }

    def leave(self, rank: int, incarnation: int) -> None:
        """Record that a worker left; raise LifecycleError if there is no such rank."""
        self._check_rank(rank)
        if incarnation == self.ledger.newest[rank]:
            self.left.add(rank)

    def lose(self, rank: int, incarnation: int) -> bool:
        """Record that a worker died, unless it had left or was replaced; return whether it did.

        Raises:
            LifecycleError: there is no such rank.
        """
        self._check_rank(rank)
        is_newest = rank in self.ledger.newest and incarnation == self.ledger.newest[rank]
        lost = is_newest and rank not in self.left
        if lost:
            self.dead.add(rank)
        return lost

    def restore(
        self, ledger: Mapping[str, Any], schedule: MembershipHistory, live_owners: Owners
    ) -> None:
        """Take over a record; what is known here of newer workers stays.

        An incarnation that was given to a worker must never be given to another.
        """
        known = self.ledger.newest_of_all()
        self.ledger = Ledger.from_dict(ledger)
        self.ledger.admit_all(known)
        self.schedule = schedule or self.schedule
        self.owners = {**live_owners, **self.owners}

    def already_counted(self, rank: int, note: Numbered, decided: int) -> bool:
        """Whether the push of this worker for this round was counted in a round decided since."""
        return note.round <= decided and self.ledger.counted(rank, note.incarnation, note.round)

    def check_current(
        self, message: msg.Push | msg.TotalNorms, epochs: Epochs, decided: int
    ) -> None:
        """Raise a ProtocolError unless the message is of this epoch, of its rank's newest worker,
        and for the round after `decided`.
        """
        rank = message.rank
        is_current = message.epoch == epochs.now and message.round == decided + 1
        is_newest = message.incarnation == self.ledger.newest[rank]
        if is_current and is_newest and rank in self.needed(message.round):
            return  # nearly every message
        who = f"shard {self._shard}: rank {rank}"
        self._check_rank(rank)
        if (refusal := epochs.refusal(message.epoch, who, decided)) is not None:
            raise refusal
        self.check_newest(rank, message.incarnation)
        if message.round <= decided:
            raise LatePush(
                f"{who}: push for round {message.round}, which is over and did not count it; "
                f"expected round {decided + 1}"
            )
        if message.round > decided + 1:
            raise RoundMismatch(
                f"{who}: expected a push for round {decided + 1}, got one for round {message.round}"
            )
        if message.rank not in self.needed(message.round):
            raise Reconfigured(
                f"{who}: is no member of round {message.round}; it must be admitted first",
                epochs.now,
                decided,
            )

    def check_newest(self, rank: int, incarnation: int) -> None:
        """Raise SupersededWorker unless this is the rank's newest worker."""
        newest = self.ledger.newest[rank]
        if incarnation != newest:
            raise SupersededWorker(
                f"shard {self._shard}: rank {rank} was taken over by worker {newest}; worker "
                f"{incarnation} must stop"
            )

    def abandoned(self, number: int, pushed: Collection[int]) -> WorkerLost | None:
        """Return WorkerLost if a rank given up has not pushed for round `number`, else None."""
        if not self.given_up:
            return None
        missing = sorted(self.given_up & set(self.needed(number)) - set(pushed))
        if not missing:
            return None
        who = f"shard {self._shard}: worker {missing[0]}"
        return WorkerLost(
            f"{who} died before it pushed for round {number} and nobody took it over; the others' "
            "pushes were dropped"
        )

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self._num_workers:
            raise LifecycleError(f"rank must be in [0, {self._num_workers}), got {rank}")
