"""The pushes of one host's workers on their way to a shard of another: those of a group as one sum.

A push is held until the others of its group are there; wherever they may not come, all go singly.
Called in one thread; it knows neither sockets nor hosts.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from distnadam.errors import GroupChanged
from distnadam.nadam.mean import summed
from distnadam.protocol.delivery import Reply
from distnadam.protocol.messages import GroupPush, Push
from distnadam.tensors.arrays import Array, Flat, own_errors

_BLOCK = 1 << 16
"""Elements that are summed at a time, so that they stay in the cache."""


class _Held(NamedTuple):
    """A push, and who gets its answer."""

    push: Push
    reply: Reply


class PushGroups:
    """Pushes to one shard, summed by group where the whole group is on this host.

    Args:
        num_workers: ranks.
        sum_group: ranks of a group.
        send: sends the shard a message; the reply gets its answer.
        connected: returns the ranks that can push here now.
        lend: returns memory for a sum, in the spaces' dtypes, which nothing else refers to.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        sum_group: int,
        send: Callable[[Push | GroupPush, Reply], None],
        connected: Callable[[], Collection[int]],
        lend: Callable[[], Flat],
    ) -> None:
        self._num_workers = num_workers
        self._sum_group = sum_group
        self._send = send
        self._connected = connected
        self._lend = lend
        self._held: dict[int, dict[int, _Held]] = {}
        self._newest: dict[int, tuple[int, int]] = {}  # by group, the epoch and round last sent
        self._absent: set[int] = set()  # waited for in vain, and have not pushed since

    @property
    def is_waiting(self) -> bool:
        """Whether a push waits for others of its group."""
        return bool(self._held)

    def put(self, push: Push, reply: Reply) -> None:
        """Send a push, with its group's once they are all there."""
        number = push.rank // self._sum_group
        self._absent.discard(push.rank)
        first = number * self._sum_group
        ranks = range(first, min(first + self._sum_group, self._num_workers))
        held = self._held.get(number, {})
        if (
            len(ranks) == 1
            or push.gradients is None
            or push.rank in held
            or any(_turn(other.push) != _turn(push) for other in held.values())
            or _turn(push) <= self._newest.get(number, (-1, 0))
            or not set(ranks) <= set(self._connected()) - self._absent
        ):
            self._release(number)
            self._pass(push, reply)
            return
        held[push.rank] = _Held(push, reply)
        self._held[number] = held
        if len(held) == len(ranks):
            del self._held[number]
            self._send_sum({rank: held[rank] for rank in ranks})

    def gone(self, rank: int) -> None:
        """Let those go singly who wait for a rank that is not here any more."""
        self._release(rank // self._sum_group)

    def release(self) -> None:
        """Let all go singly that wait; wait for the others again only once they push."""
        for number, held in list(self._held.items()):
            first = number * self._sum_group
            self._absent |= set(range(first, first + self._sum_group)) - held.keys()
            self._release(number)

    def clear(self) -> None:
        """Forget what waits; nobody is here any more."""
        self._held.clear()

    def _release(self, number: int) -> None:
        for push, reply in self._held.pop(number, {}).values():
            self._pass(push, reply)

    def _pass(self, push: Push, reply: Reply) -> None:
        """Send a push by itself; what others of its group send for its round goes so too."""
        number = push.rank // self._sum_group
        self._newest[number] = max(_turn(push), self._newest.get(number, (-1, 0)))
        self._send(push, reply)

    def _send_sum(self, held: Mapping[int, _Held]) -> None:
        first = next(iter(held.values())).push
        try:
            total = self._lend()
        except MemoryError:
            for push, reply in held.values():
                self._pass(push, reply)
            return
        self._newest[first.rank // self._sum_group] = _turn(first)
        for space, out in total.items():
            sum_into(out, [p.gradients[space] for p, _ in held.values() if p.gradients is not None])

        def answered(answer: Any) -> None:
            for push, reply in held.values():
                if isinstance(answer, GroupChanged):
                    self._pass(push, reply)
                else:
                    reply(answer)

        members = {rank: push.note for rank, (push, _) in held.items()}
        group = GroupPush(epoch=first.epoch, round=first.round, members=members, gradients=total)
        self._send(group, answered)


def _turn(push: Push) -> tuple[int, int]:
    return push.epoch, push.round


@own_errors()
def sum_into(out: Array, gradients: list[Array]) -> None:
    """Leave the sum of gradients in `out`, in its dtype and in their order, as the mean's is."""
    spare = np.empty(min(_BLOCK, out.size), out.dtype)
    for begin in range(0, out.size, _BLOCK):
        block = out[begin : begin + _BLOCK]
        total = summed([g[begin : begin + _BLOCK] for g in gradients], block, spare[: block.size])
        if total is not block:
            np.copyto(block, total)
