"""A worker's end of its channels to the shards of its machine, and to the relay that stands for
others: gradients in an arena of its own, frames over sockets, no Ray in the path.

If a channel cannot be opened, LaneError or ArenaError is raised, and the caller uses Ray objects.
"""

import os
import select
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distnadam.errors import DistNadamError, LaneError, ShardLost
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.messages import Leave, Message, Push, PushSlice, RoundResult
from distnadam.tensors.arrays import Dtypes, Flat, cut_flat
from distnadam.tensors.layout import Ranges
from distnadam.transport.home_core import HomeCore, partner_first
from distnadam.transport.shared_memory import Arena
from distnadam.transport.spinning import has_free_cores, spin
from distnadam.transport.unix_connection import (
    AWAIT_S,
    Address,
    Connection,
    connect,
    use_batch_scheduling,
)

_LONGEST_S = 86400.0
"""Seconds of one poll, whose milliseconds must fit 31 bits."""


class ShmClient:
    """One worker's end: an arena for its gradients, and a connection to each shard of the machine.

    If this object is dropped without `close`, it sends Leave; if its process ends, the shards see
    the end of the connections and count the worker as dead.

    Args:
        sizes: elements of the whole model per space.
        ranges: what each shard holds.
        rank: the worker's rank.
        incarnation: the worker's incarnation.
        pull_dtypes: the layout's; None for the spaces' own.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        ranges: list[Ranges],
        rank: int,
        incarnation: int,
        pull_dtypes: Dtypes | None = None,
    ) -> None:
        self._sizes = sizes
        self._pull_dtypes = pull_dtypes
        self._ranges = ranges
        self._rank = rank
        self._incarnation = incarnation
        self._arena = Arena.create(sizes)
        self._parameters: Arena | None = None
        self._connections: dict[int, Connection] = {}
        self._peers: dict[int, str] = {}
        self._shard_of: dict[int, int] = {}
        self._answers: dict[int, dict[int, Any]] = {}
        try:
            self._poll = select.epoll()  # whose every wait costs less than that of `select.poll`
        except OSError as error:
            raise LaneError(f"no descriptor to wait for shards: {error}") from error
        self._number = 0
        self._thread = 0
        self._spins = False
        self._home = HomeCore(rank, 0)
        self._last: tuple[bytes, tuple[int, Any]] = b"", (0, None)
        self._asked: Iterable[int] = ()  # the shards that the last number was sent to
        self._parts: Sequence[Flat] = ()
        self._alike: list[tuple[Flat, list[int]]] = []
        self._leave: Any = None
        self._leave_when_dropped()

    def _leave_when_dropped(self) -> None:
        if self._leave is not None:
            self._leave.detach()
        leave = Leave(self._rank, self._incarnation)
        self._leave = weakref.finalize(self, _send_leave, self._connections, leave)
        self._leave.atexit = False

    @property
    def gradients(self) -> Flat:
        """The arena that this worker writes its gradients into."""
        return self._arena.flats[0]

    @property
    def parameters(self) -> tuple[Flat, ...]:
        """Both buffers of the machine's parameters, read-only, or () before the first channel.

        Only the ranges of shards with a channel are written.
        """
        return () if self._parameters is None else self._parameters.flats

    @property
    def complete(self) -> bool:
        """Whether every shard has a channel."""
        return len(self._connections) == len(self._ranges)

    def open(self, shard: int, address: Address, peer: str = "its process") -> None:
        """Open the channel to a shard in place of an earlier one.

        Args:
            shard: its index.
            address: where it listens, or who stands for it.
            peer: what an end of the connection is the death of, for errors.

        Raises:
            LaneError: no shard of ours listens there, or its parameters lie in another arena than
                those of the other shards.
            ArenaError: its parameters cannot be mapped.
        """
        self.drop(shard)
        greeting = {"rank": self._rank, "incarnation": self._incarnation}
        connection, answer, fds = connect(address, greeting, [self._arena.fd])
        self._spins = has_free_cores(answer["processes"])
        try:
            known = self._parameters is not None and os.path.samestat(
                os.fstat(self._parameters.fd), os.fstat(fds[0])
            )
            if not known and self._connections:
                raise LaneError(
                    f"shard {shard} keeps its parameters in another arena than its neighbours"
                )
            if not known:  # no shard writes to an earlier arena any more
                self._parameters = Arena.attach(
                    fds.pop(), self._sizes, copies=2, dtypes=self._pull_dtypes
                )
        except DistNadamError:
            connection.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        assert self._parameters is not None
        self._parameters.populate(self._ranges[shard])
        self._connections[shard] = connection
        self._peers[shard] = peer
        self._shard_of[connection.fileno()] = shard
        pairs = min(answer["workers"], len(self._ranges)) if self.complete else 0
        self._home = HomeCore(self._rank, pairs)
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def reset(self, ranges: list[Ranges], incarnation: int) -> None:
        """Close all channels; open later ones to shards of these ranges, as this incarnation."""
        for shard in list(self._connections):
            self.drop(shard)
        self._ranges = ranges
        self._incarnation = incarnation
        self._leave_when_dropped()

    def drop(self, shard: int) -> None:
        """Close the channel to a shard, if any."""
        connection = self._connections.pop(shard, None)
        if connection is not None:
            self._poll.unregister(connection.fileno())
            del self._shard_of[connection.fileno()]
            connection.close()

    def __contains__(self, shard: int) -> bool:
        return shard in self._connections

    def post(self, messages: Mapping[int, Message]) -> int:
        """Send each shard its message; return the number for `collect`."""
        number = self._next_number()
        self._asked = list(messages)
        for shard, message in messages.items():
            self._send(shard, pack(number, message))
        return number

    def post_push(self, push: Push, parts: Sequence[Flat]) -> int:
        """Send every shard a push with its part of the gradients; return the number for `collect`.

        It takes one frame where the parts lie in the same dtypes, since those are all that it says
        of them.
        """
        number = self._next_number()
        if parts is not self._parts:
            self._parts, self._alike = parts, _alike(parts)
        self._asked = self._connections.keys()
        for part, shards in self._alike:
            push.gradients = part
            frame = pack(number, push)
            for shard in shards:
                self._send(shard, frame)
        return number

    def _next_number(self) -> int:
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            use_batch_scheduling()
        self._number += 1
        self._answers = {self._number: {}}  # drops the answers to earlier numbers
        return self._number

    def tell(self, shard: int, message: PushSlice) -> None:
        """Send a shard what it does not answer."""
        self._send(shard, pack(0, message))

    def _send(self, shard: int, frame: bytes) -> None:
        connection = self._connections[shard]
        if not connection.send(frame):
            self._poll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def collect(self, number: int, count: int, deadline: float) -> dict[int, Any]:
        """Return the `count` shards' answers to the messages of that number.

        Raises:
            DistNadamError: what the first shard that refused raised.
            ShardLost: a shard died, which the end of its connection says at once.
            TimeoutError: not all answered before the deadline (of `time.monotonic`); may be called
                again.
        """
        answers = self._answers.get(number, {})
        if deadline - time.monotonic() > AWAIT_S:
            self._await_in_turn(answers)
        while len(answers) < count:
            left_s = min(max(0.0, deadline - time.monotonic()), _LONGEST_S)
            events = (self._spins and spin(self._poll.poll)) or self._poll.poll(left_s)
            if not events and time.monotonic() >= deadline:
                raise TimeoutError
            for fd, event in events:
                if fd in self._shard_of:
                    self._attend(self._shard_of[fd], event)
        return answers

    def common_answer(self, number: int) -> Any:
        """Return what all shards answer to a push of that number, if they answer soon and alike;
        else None: then `collect` has what came.

        Raises:
            DistNadamError, ShardLost: as `collect`.
        """
        answers = self._answers.get(number, {})
        self._await_in_turn(answers)
        if len(answers) < len(self._ranges):
            return None
        first, *others = answers.values()
        return first if all(other is first for other in others) else None

    def _await_in_turn(self, answers: Mapping[int, Any]) -> None:
        """Wait for one shard's answer after the other, as long as each comes soon: so this thread
        is woken less often than by a wait for all.
        """
        with self._home:
            for shard in partner_first([*self._asked], self._rank):
                if shard in answers:
                    continue
                connection = self._connections[shard]
                if connection.has_unsent:
                    return
                if not self._take(shard, connection.receive_soon(spins=self._spins)):
                    return

    def parameters_of(self, shard: int, result: RoundResult) -> Flat:
        """Return views of one shard's ranges in the buffer that an answer names."""
        return cut_flat(self.parameters[result.buffer], self._ranges[shard])

    def close(self) -> None:
        """Send Leave and close the channels; views of the memory stay valid."""
        self._leave()

    def _attend(self, shard: int, event: int) -> None:
        connection = self._connections[shard]
        if event & select.EPOLLOUT and connection.flush():
            self._poll.modify(connection.fileno(), select.EPOLLIN)
        if not event & ~select.EPOLLOUT:
            return
        self._take(shard, connection.receive())

    def _take(self, shard: int, frames: list[bytes] | None) -> bool:
        """Take what has come from a shard; return whether anything has."""
        if frames is None:
            self.drop(shard)
            raise ShardLost(f"shard {shard}: {self._peers[shard]} died")
        for frame in frames:
            if frame != self._last[0]:  # shards that are alike answer alike
                self._last = frame, unpack(frame)
            number, answer = self._last[1]
            if number not in self._answers:
                continue
            if isinstance(answer, DistNadamError):
                raise answer
            self._answers[number][shard] = answer
        return bool(frames)


def _alike(parts: Sequence[Flat]) -> list[tuple[Flat, list[int]]]:
    """Return shards by what the frames of their pushes say, each with one of their parts."""
    found: dict[tuple[Any, ...], tuple[Flat, list[int]]] = {}
    for shard, part in enumerate(parts):
        says = tuple((space, array.dtype) for space, array in part.items())
        found.setdefault(says, (part, []))[1].append(shard)
    return list(found.values())


def _send_leave(connections: dict[int, Connection], leave: Leave) -> None:
    for connection in connections.values():
        connection.send(pack(0, leave))
        connection.close()
    connections.clear()
