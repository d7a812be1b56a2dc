"""A shard's end of the channels over shared memory: it steps over the workers' arenas and writes
parameters into the machine's own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from distnadam.errors import DistNadamError, LaneError, ShardLost
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.delivery import Deliver, run_in_this_thread
from distnadam.protocol.messages import Leave, ShardSpec, WorkerDied
from distnadam.tensors.arrays import Flat, dtype_of
from distnadam.tensors.layout import Ranges
from distnadam.transport.connection import Address, Connection, Server, call
from distnadam.transport.shared_memory import Arena


def parameter_arena(spec: ShardSpec, neighbour: Address | None) -> Arena:
    """Return the machine's two parameter buffers: a neighbouring shard's where there is one, new
    ones otherwise.
    """
    if neighbour is None:
        arena = Arena.create(spec.layout.sizes, copies=2)
    else:
        line, _, fds = call(neighbour, {"rank": None}, [])
        line.close()
        arena = Arena.attach(fds[0], spec.layout.sizes, copies=2, writable=True)
    arena.populate(spec.ranges)
    return arena


class ShmServer:
    """One shard's end of its lanes.

    Args:
        spec: the shard's spec.
        parameters: the arena that its parameter buffers lie in.
        deliver: takes a message, a callable for its answer, and who carries out the work: the
            lane's own thread.
    """

    def __init__(self, spec: ShardSpec, parameters: Arena, deliver: Deliver) -> None:
        self._spec, self._parameters, self._deliver = spec, parameters, deliver
        self._workers: dict[Connection, _Caller] = {}
        self._memories: dict[
            int, _Caller
        ] = {}  # by rank; kept after the worker's end, for a push that counts after all
        self._server = Server(self._greet, self._take, self._end)

    @property
    def address(self) -> Address:
        """Where workers and neighbours call."""
        return self._server.address

    def slot(self, rank: int, incarnation: int, dtypes: dict[str, str]) -> Flat | None:
        """Return the shard's ranges in the memory of the rank's last worker here, where that is the
        one meant, dead or alive.
        """
        last = self._memories.get(rank)
        return (
            last.gradients(dtypes) if last is not None and last.incarnation == incarnation else None
        )

    def close(self) -> None:
        """Hang up on everyone."""
        self._server.close()

    def _greet(
        self, line: Connection, greeting: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if greeting["rank"] is not None:
            if len(fds) != 1:
                raise LaneError(f"expected one arena, got {len(fds)}")
            arena = Arena.attach(fds.pop(), self._spec.layout.sizes)
            arena.populate(self._spec.ranges)
            self._workers[line] = _Caller(
                line, greeting["rank"], greeting["incarnation"], arena, self._spec.ranges
            )
            self._memories[greeting["rank"]] = self._workers[line]
        return {}, [self._parameters.fd]

    def _take(self, line: Connection, frame: bytes) -> None:
        worker = self._workers[line]
        number, message = unpack(frame, worker.gradients)
        if (message.rank, message.incarnation) != (worker.rank, worker.incarnation):
            raise LaneError(
                f"a message of worker {message.rank} came through the lane of worker {worker.rank}"
            )
        reply = _ignore if isinstance(message, Leave) else partial(worker.answer, number)
        self._deliver(message, reply, run_in_this_thread)

    def _end(self, line: Connection) -> None:
        if (worker := self._workers.pop(line, None)) is not None:
            self._deliver(WorkerDied(worker.rank, worker.incarnation), _ignore, run_in_this_thread)


class _Caller:
    """A worker as its shard sees it: a line, and views of its arena."""

    def __init__(
        self, line: Connection, rank: int, incarnation: int, arena: Arena, ranges: Ranges
    ) -> None:
        self._line, self.rank, self.incarnation = line, rank, incarnation
        self._arena, self._ranges = arena, ranges
        self._views: dict[tuple[str, ...], Flat] = {}

    def gradients(self, dtypes: Mapping[str, str]) -> Flat:
        key = tuple(dtypes.values())
        if key not in self._views:
            flat = self._arena.flat(
                dtypes={space: dtype_of(name) for space, name in dtypes.items()}
            )
            self._views[key] = {
                space: flat[space][begin:end] for space, (begin, end) in self._ranges.items()
            }
        return self._views[key]

    def answer(self, number: int, reply: Any) -> None:
        if isinstance(reply, Exception) and not isinstance(reply, DistNadamError):
            reply = ShardLost(f"{type(reply).__name__}: {reply}")
        self._line.send(pack(number, reply))


def _ignore(_: Any) -> None:
    """Nobody waits for the answer to an end of line."""
