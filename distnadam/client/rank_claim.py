"""One worker's claim on a rank at all shards: its incarnation, and the pushes of former ones.

It joins, renews and gives up the claim, and sees to it that a push which one shard counts counts
on all. No gradients of its own, no rounds.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distnadam.client.in_flight_push import InFlightPush
from distnadam.client.shard_group import ShardGroup
from distnadam.errors import DistNadamError, IllegalMessage, SupersededWorker
from distnadam.protocol.messages import Describe, Join, Joined, Leave, Message
from distnadam.protocol.orphaned_push import orphaned_pushes
from distnadam.tensors.arrays import Flat


class _NotAdmitted(DistNadamError):
    """The rank is not yet a member again."""


class RankClaim:
    """The rank, and the number of the worker that has it: the newest one, until another joins."""

    def __init__(self, shards: ShardGroup, rank: int) -> None:
        self.rank = rank
        self._shards = shards
        self._process = shards.backend.transport.new_token()
        self._settled = 0
        self.incarnation = shards.retry.run(self._join)

    def leave(self) -> None:
        """Depart after a whole step; the rank stays free for a new worker."""
        self._ask(self._shards.for_all(Leave(self.rank, self.incarnation)))

    def rejoin(self) -> None:
        """Join the shards as they are now; a push of this worker itself is sent again instead."""
        self._shards.retry.run(
            lambda: self._complete(self._join_again(), in_flight=self.incarnation)
        )

    def complete_orphans(self) -> bool:
        """Have every push of a former worker that one shard counts count on all.

        Return whether a shard waits for norms from workers that are all replaced.
        """
        joined = self._join_again()
        self._complete(joined)
        return any(answer.orphaned for answer in joined.values())

    def is_settled(self, epoch: int) -> bool:
        """Whether the pushes of former workers were seen to in this epoch; if not, see to them now.

        A shard that has taken a dead one's place since knows of none that others count already.
        """
        if self.incarnation == 1 or epoch == self._settled:
            return True
        self.complete_orphans()
        self._settled = epoch
        return False

    def renew(self, push: InFlightPush, *, adopting: bool) -> bool:
        """Take a new incarnation after a shard dropped a push: another may still count the old one.

        A rank, an incarnation and a round name one gradient for ever, so no shard can count the
        dropped push beside another that is pushed next.

        Args:
            push: the dropped push.
            adopting: have it count on all shards if one had counted it.

        Returns:
            Whether one had counted it, and it now counts on all.
        """
        old = self.incarnation
        self.incarnation += 1
        joined = self._shards.retry.run(self._join_again_in_order)
        notes = [answer.committed for answer in joined.values()]
        counted = adopting and any(
            note is not None and (note.incarnation, note.round) == (old, push.round)
            for note in notes
        )
        if counted:
            parts = push.parts(self._shards.ranges)
            self._complete(joined, gradients=dict(enumerate(parts)))
        return counted

    def _ask(self, messages: Mapping[int, Message]) -> dict[int, Any]:
        return self._shards.ask(messages, who=f"worker {self.rank}")

    def _join(self) -> int:
        joined = self._shards.retry.poll(
            self._join_all,
            f"worker {self.rank}: the shards did not agree on who takes the rank over",
            until_not=SupersededWorker,  # shard 0 hears of the newer one meanwhile
        )
        self._complete(joined)
        if not joined[0].member:
            self._shards.retry.poll(
                self._require_member,
                f"worker {self.rank}: was not admitted as a member",
                until_not=_NotAdmitted,
            )
        return joined[0].incarnation

    def _join_all(self) -> dict[int, Joined]:
        """Have shard 0 give an incarnation, and the others take it."""
        first: Joined = self._ask({0: Join(rank=self.rank, process=self._process)})[0]
        message = Join(rank=self.rank, incarnation=first.incarnation, process=self._process)
        others = range(1, len(self._shards.ranges))
        return {0: first} | self._ask(dict.fromkeys(others, message))

    def _join_again(self) -> dict[int, Joined]:
        return self._ask(self._shards.for_all(self._message()))

    def _join_again_in_order(self) -> dict[int, Joined]:
        """Have shard 0 know of a new incarnation before the others do, as at any join."""
        first: dict[int, Joined] = self._ask({0: self._message()})
        others = range(1, len(self._shards.ranges))
        return first | self._ask(dict.fromkeys(others, self._message()))

    def _message(self) -> Join:
        return Join(rank=self.rank, incarnation=self.incarnation, process=self._process)

    def _complete(
        self,
        joined: Mapping[int, Joined],
        in_flight: int = 0,
        gradients: Mapping[int, Flat] | None = None,
    ) -> None:
        """Have the rank's push that some shard counts count on all.

        Args:
            joined: the shards' answers.
            in_flight: the incarnation that sends its push again by itself.
            gradients: that push's, by shard, if they are at hand.
        """
        messages = {
            shard: message
            for shard, message in orphaned_pushes(self.rank, joined).items()
            if message.note.incarnation != in_flight
        }
        if gradients is not None:
            messages = {
                i: replace(m, gradients=None if m.note.rejection else gradients[i])
                for i, m in messages.items()
            }
        try:
            self._ask(messages)
        except IllegalMessage as error:
            self._shards.go_back(f"{error}; all shards must go back", cause=error)

    def _require_member(self) -> None:
        """Raise unless the supervisor has made this rank a member again, at a round it chooses."""
        if self.rank not in self._ask({0: Describe()})[0].members:
            raise _NotAdmitted
