"""A shard's end of the channels over shared memory, or that of the relay which stands for it: it
reads the workers' arenas and writes parameters into the machine's.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.delivery import Deliver, portable, run_in_this_thread
from distnadam.protocol.messages import Leave, PushSlice, ShardSpec, WorkerDied
from distnadam.tensors.arrays import Flat, cut_flat, dtype_of
from distnadam.tensors.layout import Ranges
from distnadam.transport.connection import Address, Connection, ConnectionServer, connect
from distnadam.transport.shared_memory import Arena
from distnadam.transport.spinning import has_free_cores, processes_of

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


class ShmServer:
    """One shard's end of its channels.

    Args:
        spec: the shard's spec.
        parameters: the arena of its parameter buffers.
        deliver: called with each message in the server's thread, which also runs its work.
        loop: the running event loop whose thread that is; None for one of its own.
    """

    def __init__(
        self,
        spec: ShardSpec,
        parameters: Arena,
        deliver: Deliver,
        loop: "asyncio.AbstractEventLoop | None" = None,
    ) -> None:
        self._spec = spec
        self._parameters: Arena | None = parameters
        self._deliver = deliver
        self._workers: dict[Connection, _WorkerEnd] = {}
        # by rank; kept after a worker's end, for a push that is counted later
        self._newest: dict[int, _WorkerEnd] = {}
        self._processes = processes_of(spec)
        spins = loop is None and has_free_cores(self._processes)
        self._server = ConnectionServer(self._greet, self._take, self._end, loop, spins=spins)

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
                connection, greeting["rank"], greeting["incarnation"], arena, self._spec.ranges
            )
            self._workers[connection] = worker
            self._newest[worker.rank] = worker
        return {"processes": self._processes}, [self._parameters.fd]

    def _take(self, connection: Connection, frame: bytes) -> None:
        worker = self._workers[connection]
        number, message = unpack(frame, worker.gradients)
        if (message.rank, message.incarnation) != (worker.rank, worker.incarnation):
            raise LaneError(
                f"a message of worker {message.rank} came through the lane of worker {worker.rank}"
            )
        reply = (
            _ignore if isinstance(message, Leave | PushSlice) else partial(worker.answer, number)
        )
        self._deliver(message, reply, run_in_this_thread)

    def _end(self, connection: Connection) -> None:
        if (worker := self._workers.pop(connection, None)) is not None:
            self._deliver(WorkerDied(worker.rank, worker.incarnation), _ignore, run_in_this_thread)


class _WorkerEnd:
    """A worker as its shard sees it: a connection, and views of its arena."""

    def __init__(
        self, connection: Connection, rank: int, incarnation: int, arena: Arena, ranges: Ranges
    ) -> None:
        self._connection = connection
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

    def answer(self, number: int, reply: Any) -> None:
        self._connection.send(pack(number, portable(reply)))


def _ignore(_: Any) -> None:
    """Drop the answer to what is not answered."""
