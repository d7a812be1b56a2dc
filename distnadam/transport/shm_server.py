"""A shard's end of the channels over shared memory, or that of the relay which stands for it: it
reads the workers' arenas and writes parameters into the machine's.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.delivery import Deliver, portable, run_in_this_thread
from distnadam.protocol.messages import Leave, Push, PushSlice, RoundResult, ShardSpec, WorkerDied
from distnadam.tensors.arrays import Flat, cut_flat, dtype_of
from distnadam.tensors.layout import Ranges
from distnadam.transport.home_core import HomeCore, partner_first
from distnadam.transport.shared_memory import Arena
from distnadam.transport.spinning import has_free_cores, processes_of
from distnadam.transport.unix_connection import (
    AWAIT_S,
    Address,
    Connection,
    ConnectionServer,
    connect,
)

if TYPE_CHECKING:
    import asyncio


def parameter_arena(spec: ShardSpec, neighbour: Address | None) -> Arena:
    """Return the machine's two parameter buffers: a neighbouring shard's, or new ones if None.

    Raises:
        LaneError: the neighbour cannot be reached.
        ArenaError: the memory is not available.
    """
    sizes, dtypes = spec.layout.sizes, spec.layout.pull_dtypes
    if neighbour is None:
        arena = Arena.create(sizes, copies=2, dtypes=dtypes)
    else:
        connection, _, fds = connect(neighbour, {"rank": None}, [])
        connection.close()
        arena = Arena.attach(fds[0], sizes, copies=2, writable=True, dtypes=dtypes)
    arena.populate(spec.ranges)
    return arena


_IN_A_ROW = 3
"""Rounds stepped at once after which the next may be prepared for."""


class Ahead(Protocol):
    """Rounds that are prepared for (`runtime/rounds_ahead.py:RoundsAhead`)."""

    def take(self, frames: Sequence[bytes]) -> Sequence[bytes] | None:
        """Step the next round and return its answers; None if its frames must be read."""

    def prepare(self) -> None:
        """Prepare for the next round."""


class StepsAtOnce(Protocol):
    """A shard that takes all pushes of a round in one call (`ShardHost`)."""

    def step_at_once(self, first: Push, *others: Push) -> RoundResult | None:
        """Step the round that pushes complete, and return its end; None if each is to be
        delivered.
        """

    def go_ahead(self, numbers: Sequence[int], pushes: Sequence[Push]) -> Ahead | None:
        """Prepare for more rounds of such pushes; None if each is to be read."""


class ShmServer:
    """One shard's end of its channels.

    Args:
        spec: the shard's spec.
        parameters: the arena of its parameter buffers.
        deliver: called with each message in the server's thread, which also runs its work.
        loop: the running event loop whose thread that is; None for one of its own.
        at_once: steps rounds at once, where all pushes of one have come; None if each push is to be
            delivered.
    """

    def __init__(
        self,
        spec: ShardSpec,
        parameters: Arena,
        deliver: Deliver,
        loop: "asyncio.AbstractEventLoop | None" = None,
        at_once: "StepsAtOnce | None" = None,
    ) -> None:
        self._at_once = at_once
        self._ahead: Ahead | None = None
        self._in_a_row = 0  # rounds that were stepped at once
        # who was answered last, and whose next pushes are awaited together
        self._answered: list[_WorkerEnd] = []
        self._expected: Sequence[_WorkerEnd] = ()
        self._spec = spec
        self._parameters: Arena | None = parameters
        self._deliver = deliver
        self._workers: dict[Connection, _WorkerEnd] = {}
        # by rank; kept after a worker's end, for a push that is counted later
        self._newest: dict[int, _WorkerEnd] = {}
        self._processes = processes_of(spec)
        self._home = HomeCore(spec.index, 0)
        self._spins = spins = loop is None and has_free_cores(self._processes)
        self._server = ConnectionServer(
            self._greet,
            self._take,
            self._end,
            loop,
            spins=spins,
            on_idle=self._take_rounds,
        )

    @property
    def address(self) -> Address:
        """Where workers and neighbours connect."""
        return self._server.address

    @property
    def num_workers(self) -> int:
        """How many workers are connected."""
        return len(self._workers)

    @property
    def ranks(self) -> set[int]:
        """The ranks whose workers are connected."""
        return {worker.rank for worker in self._workers.values()}

    def gradients_of(self, rank: int, incarnation: int, dtypes: dict[str, str]) -> Flat | None:
        """Return views of the shard's ranges in that worker's arena, dead or alive.

        None if the worker is not the last of its rank that connected here.
        """
        last = self._newest.get(rank)
        return (
            last.gradients(dtypes) if last is not None and last.incarnation == incarnation else None
        )

    def close(self) -> None:
        """Stop listening, close the connections, and release all memory, which a reference to this
        object would keep.
        """
        self._server.close()
        self._workers.clear()
        self._newest.clear()
        self._parameters = None

    def _greet(
        self, connection: Connection, greeting: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if self._parameters is None:
            raise LaneError("it is closed")
        if greeting["rank"] is not None:
            if len(fds) != 1:
                raise LaneError(f"expected one arena, got {len(fds)}")
            arena = Arena.attach(fds.pop(), self._spec.layout.sizes)
            arena.populate(self._spec.ranges)
            worker = _WorkerEnd(
                connection,
                greeting["rank"],
                greeting["incarnation"],
                arena,
                self._spec.ranges,
                self._answered,
            )
            self._workers[connection] = worker
            self._newest[worker.rank] = worker
            all_are_here = self.ranks == set(range(self._spec.num_workers))
            pairs = min(self._spec.num_shards, self._spec.num_workers) if all_are_here else 0
            self._home = HomeCore(self._spec.index, pairs)
        answer = {"processes": self._processes, "workers": self._spec.num_workers}
        return answer, [self._parameters.fd]

    def _take(self, connection: Connection, frame: bytes) -> None:
        worker = self._workers[connection]
        number, message = worker.read(frame)
        reply = (
            _ignore if isinstance(message, Leave | PushSlice) else partial(worker.answer, number)
        )
        self._answered.clear()
        self._deliver(message, reply, run_in_this_thread)
        if len(self._answered) >= min(2, len(self._workers)) and self._at_once is not None:
            round_of = sorted(self._answered, key=lambda worker: worker.rank)
            self._expected = partner_first(round_of, self._spec.index)

    def _take_rounds(self) -> bool:
        """Take rounds while the pushes of each come soon, for a moment; return whether those of the
        next are awaited.

        A thread that waits for one connection after the other is woken less often than one that
        waits for all, and what came from each is entered together.
        """
        until = time.monotonic() + AWAIT_S
        while self._expected and time.monotonic() < until:
            expected, self._expected = self._expected, ()
            came = self._await(expected, until + AWAIT_S)
            if len(came) == len(expected) and (self._take_ahead(came) or self._take_round(came)):
                self._expected = expected
                continue
            self._ahead, self._in_a_row = None, 0
            for worker, frames in came:
                self._server.take(worker.connection, frames)
        return bool(self._expected)

    def _await(self, expected: "Sequence[_WorkerEnd]", until: float) -> "_Came":
        """Return what comes from each of those, up to the first from which nothing does."""
        came: _Came = []
        with self._home:
            for worker in expected:
                came.append((worker, frames := worker.await_frames(spins=self._spins)))
                if not frames or time.monotonic() > until:
                    break
        return came

    def _take_round(self, came: "_Came") -> bool:
        """Step the round that each worker's frame is a push for, and answer them; return False if
        each is to be taken by itself.
        """
        assert self._at_once is not None
        self._ahead = None
        numbers, pushes = [], []
        try:
            for worker, frames in came:
                if frames is None or len(frames) != 1:
                    return False
                number, message = worker.read(frames[0])
                if type(message) is not Push:
                    return False
                numbers.append(number)
                pushes.append(message)
            result = self._at_once.step_at_once(*pushes)
        except Exception:  # what is wrong, each worker is told when its push is taken
            return False
        if result is None:
            return False
        for (worker, _), number in zip(came, numbers, strict=True):
            worker.connection.send(pack(number, result))
        self._in_a_row += 1
        if self._in_a_row % _IN_A_ROW == 0:
            self._ahead = self._at_once.go_ahead(numbers, pushes)
        return True

    def _take_ahead(self, came: "_Came") -> bool:
        """Have the frames of a round taken as those of one that was prepared for."""
        if (ahead := self._ahead) is None:
            return False
        frames = [frame for _, several in came for frame in several or ()]
        if len(frames) != len(came) or (answers := ahead.take(frames)) is None:
            return False
        for (worker, _), answer in zip(came, answers, strict=True):
            worker.connection.send(answer)
        ahead.prepare()
        return True

    def _end(self, connection: Connection) -> None:
        if (worker := self._workers.pop(connection, None)) is not None:
            self._deliver(WorkerDied(worker.rank, worker.incarnation), _ignore, run_in_this_thread)


class _WorkerEnd:
    """A worker as its shard sees it: a connection, and views of its arena."""

    def __init__(
        self,
        connection: Connection,
        rank: int,
        incarnation: int,
        arena: Arena,
        ranges: Ranges,
        answered: "list[_WorkerEnd]",
    ) -> None:
        self.connection = connection
        self._answered = answered
        self.rank = rank
        self.incarnation = incarnation
        self._arena = arena
        self._ranges = ranges
        self._views: dict[tuple[str, ...], Flat] = {}

    def gradients(self, dtypes: Mapping[str, str]) -> Flat:
        key = tuple(dtypes.values())
        if key not in self._views:
            whole = self._arena.flat(
                dtypes={space: dtype_of(name) for space, name in dtypes.items()}
            )
            self._views[key] = cut_flat(whole, self._ranges)
        return self._views[key]

    def await_frames(self, *, spins: bool) -> list[bytes] | None:
        """Return what comes from the worker soon; None if nothing will any more."""
        try:
            return self.connection.receive_soon(spins=spins)
        except LaneError:
            return None

    def read(self, frame: bytes) -> tuple[int, Any]:
        """Return the number and the message of a frame.

        Raises:
            LaneError: it is no message, or another worker's.
        """
        number, message = unpack(frame, self.gradients)
        if (message.rank, message.incarnation) != (self.rank, self.incarnation):
            raise LaneError(
                f"a message of worker {message.rank} came through the lane of worker {self.rank}"
            )
        return number, message

    def answer(self, number: int, reply: Any) -> None:
        self.connection.send(pack(number, portable(reply)))
        if type(reply) is RoundResult:
            self._answered.append(self)


_Came = list[tuple[_WorkerEnd, list[bytes] | None]]
"""What came from each worker; None from one that is gone."""


def _ignore(_: Any) -> None:
    """Drop the answer to what is not answered."""
