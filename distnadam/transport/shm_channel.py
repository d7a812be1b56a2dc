"""A worker's end of its channels to the shards of its machine: gradients in its arena, frames over
sockets, no Ray in the path.

Whoever cannot open a channel gets a LaneError or ArenaError, and uses Ray objects.
"""

import os
import select
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from distnadam.errors import DistNadamError, LaneError, ShardLost
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.messages import Leave, Message, RoundResult
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges
from distnadam.transport.connection import Address, Connection, call, use_batch_scheduling
from distnadam.transport.shared_memory import Arena

_LONGEST_S = 86400.0
"""Seconds of one poll, which takes no more than 31 bits of milliseconds."""


class ShmClient:
    """One worker's end of its lanes: an arena of its own, and a line to each shard of the machine.

    Where it is dropped without `close`, it takes leave; where its process ends, the lines' end says
    that the worker died.

    Args:
        sizes: elements of the whole model per space.
        ranges: what each shard holds.
        rank: the worker's rank.
        incarnation: the worker's incarnation.
    """

    def __init__(
        self, sizes: Mapping[str, int], ranges: list[Ranges], rank: int, incarnation: int
    ) -> None:
        self._sizes, self._ranges, self._rank, self._incarnation = sizes, ranges, rank, incarnation
        self._arena = Arena.create(sizes)
        self._parameters: Arena | None = None
        self._lines: dict[int, Connection] = {}
        self._answers: dict[int, dict[int, Any]] = {}
        self._poll = select.poll()
        self._shard_of: dict[int, int] = {}
        self._number = self._thread = 0
        self._drop: Any = None
        self._take_leave_at_the_end()

    def _take_leave_at_the_end(self) -> None:
        if self._drop is not None:
            self._drop.detach()
        self._drop = weakref.finalize(
            self, _take_leave, self._lines, Leave(self._rank, self._incarnation)
        )
        self._drop.atexit = False

    @property
    def gradients(self) -> Flat:
        """The arena that this worker writes gradients into."""
        return self._arena.flats[0]

    @property
    def parameters(self) -> tuple[Flat, ...]:
        """Both buffers of the machine's parameters, read-only; only the ranges of the shards with a
        lane are kept up.
        """
        return () if self._parameters is None else self._parameters.flats

    @property
    def complete(self) -> bool:
        """Whether every shard has a lane."""
        return len(self._lines) == len(self._ranges)

    def open(self, shard: int, address: Address) -> None:
        """Open the lane to a shard, in place of an older one; raise LaneError where there can be
        none.
        """
        self.drop(shard)
        line, _, fds = call(
            address, {"rank": self._rank, "incarnation": self._incarnation}, [self._arena.fd]
        )
        try:
            known = self._parameters is not None and os.path.samestat(
                os.fstat(self._parameters.fd), os.fstat(fds[0])
            )
            if not known and self._lines:
                raise LaneError(
                    f"shard {shard} keeps its parameters in another arena than its neighbours"
                )
            if not known:  # nobody is left of those who kept up an older one
                self._parameters = Arena.attach(fds.pop(), self._sizes, copies=2)
        except DistNadamError:
            line.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        assert self._parameters is not None
        self._parameters.populate(self._ranges[shard])
        self._lines[shard], self._shard_of[line.fileno()] = line, shard
        self._poll.register(line.fileno(), select.POLLIN)

    def begin_anew(self, ranges: list[Ranges], incarnation: int) -> None:
        """Take what the shards hold, and as which worker they are called, from now on; all lanes
        are to be opened anew.
        """
        for shard in list(self._lines):
            self.drop(shard)
        self._ranges, self._incarnation = ranges, incarnation
        self._take_leave_at_the_end()

    def drop(self, shard: int) -> None:
        """Hang up on a shard that is gone, or goes by another way from now on."""
        line = self._lines.pop(shard, None)
        if line is not None:
            self._poll.unregister(line.fileno())
            del self._shard_of[line.fileno()]
            line.close()

    def __contains__(self, shard: int) -> bool:
        return shard in self._lines

    def post(self, messages: Mapping[int, Message]) -> int:
        """Send each shard its message and return the number that `collect` takes."""
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            use_batch_scheduling()
        self._number += 1
        self._answers = {self._number: {}}  # what comes for older ones is of no use any more
        for shard, message in messages.items():
            line = self._lines[shard]
            if not line.send(pack(self._number, message)):
                self._poll.modify(line.fileno(), select.POLLIN | select.POLLOUT)
        return self._number

    def collect(self, number: int, count: int, deadline: float) -> dict[int, Any]:
        """Return the `count` shards' answers to the messages of that number.

        Raises:
            DistNadamError: the first shard's that refused.
            ShardLost: a shard died, as the end of its line tells at once.
            TimeoutError: not all answered before the deadline (of `time.monotonic`); may be called
                again.
        """
        answers = self._answers.get(number, {})
        while len(answers) < count:
            events = self._poll.poll(min(max(0.0, deadline - time.monotonic()), _LONGEST_S) * 1000)
            if not events and time.monotonic() >= deadline:
                raise TimeoutError
            for fd, event in events:
                if fd in self._shard_of:
                    self._attend(self._shard_of[fd], event)
        return answers

    def parameters_of(self, shard: int, decided: RoundResult) -> Flat:
        """Return the views of one shard's ranges that an answer speaks of."""
        flat = self.parameters[decided.buffer]
        return {
            space: flat[space][begin:end] for space, (begin, end) in self._ranges[shard].items()
        }

    def close(self) -> None:
        """Take leave and hang up; the memory stays as long as someone has views of it."""
        self._drop()

    def _attend(self, shard: int, event: int) -> None:
        line = self._lines[shard]
        if event & select.POLLOUT and line.flush():
            self._poll.modify(line.fileno(), select.POLLIN)
        if not event & ~select.POLLOUT:
            return
        frames = line.receive()
        if frames is None:
            self.drop(shard)
            raise ShardLost(f"shard {shard}: its process died")
        for frame in frames:
            number, answer = unpack(frame)
            if number not in self._answers:
                continue
            if isinstance(answer, DistNadamError):
                raise answer
            self._answers[number][shard] = answer


def _take_leave(lines: dict[int, Connection], leave: Leave) -> None:
    for line in lines.values():
        line.send(pack(0, leave))
        line.close()
    lines.clear()
