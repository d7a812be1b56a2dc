"""Who holds each rank of a shard's workers: incarnations, who left, who died, and whose push may count. Pure."""

import distnadam.messages as msg
from distnadam.errors import LatePush, LifecycleError, RoundMismatch, StaleEpoch, SupersededWorker
from distnadam.ledger import Ledger


class Members:
    """The workers of one shard, and the ledger of what they had counted.

    Args:
        shard: the shard's index, for messages.
        num_workers: ranks.
    """

    def __init__(self, shard: int, num_workers: int) -> None:
        self._shard, self._num_workers = shard, num_workers
        self.ledger = Ledger()
        self.left: set[int] = set()
        self.dead: set[int] = set()

    def join(self, rank: int, incarnation: int | None) -> int:
        """Give a rank to a worker and return its incarnation; raise where the rank does not exist or a newer worker has it."""
        self._check_rank(rank)
        admitted = self.ledger.admit(rank, incarnation)
        self.check_newest(rank, admitted)
        self.left.discard(rank)
        self.dead.discard(rank)
        return admitted

    def leave(self, rank: int, incarnation: int) -> None:
        """Take note that a worker closed."""
        if incarnation == self.ledger.newest(rank):
            self.left.add(rank)

    def lose(self, rank: int, incarnation: int) -> None:
        """Take note that a worker died, where it had not left nor been taken over."""
        if incarnation == self.ledger.newest(rank) and rank not in self.left:
            self.dead.add(rank)

    def already_counted(self, message: msg.Push | msg.Norms, decided: int) -> bool:
        """Whether this very push was counted in a round that is decided."""
        return message.round <= decided and self.ledger.counted(message.rank, message.incarnation, message.round)

    def check_current(self, message: msg.Push | msg.Norms, epoch: int, decided: int) -> None:
        """Raise a ProtocolError unless the message is of this epoch, of its rank's newest worker, and for the round after `decided`."""
        who = f"shard {self._shard}: rank {message.rank}"
        self._check_rank(message.rank)
        if message.epoch != epoch:
            raise StaleEpoch(f"{who}: push of epoch {message.epoch}, expected {epoch}: the state was replaced; pull and compute again")
        self.check_newest(message.rank, message.incarnation)
        if message.round <= decided:
            raise LatePush(f"{who}: push for round {message.round}, which is over and did not count it; expected round {decided + 1}")
        if message.round > decided + 1:
            raise RoundMismatch(f"{who}: expected a push for round {decided + 1}, got one for round {message.round}")

    def check_newest(self, rank: int, incarnation: int) -> None:
        """Raise SupersededWorker unless this is the rank's newest worker."""
        newest = self.ledger.newest(rank)
        if incarnation != newest:
            raise SupersededWorker(f"shard {self._shard}: rank {rank} was taken over by worker {newest}; worker {incarnation} must stop")

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self._num_workers:
            raise LifecycleError(f"rank must be in [0, {self._num_workers}), got {rank}")
