"""A shard of another host as the relay of this one has it: workers reach it as they reach a shard
of their own host, by a socket and the host's memory, and the relay passes on what they send.

All of a host's workers share one TCP connection to the shard. Where it ends, or cannot be opened,
what was asked goes by a carrier of last resort; the shard counts a push once, however often it is
sent.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.delivery import Reply, RunWork
from distnadam.protocol.frames import HEADER
from distnadam.protocol.messages import (
    GroupPush,
    Leave,
    Message,
    Pull,
    Push,
    PushSlice,
    RoundResult,
    ShardSpec,
    TotalNorms,
    WorkerDied,
)
from distnadam.protocol.supervisor_messages import Order
from distnadam.tensors.arrays import cut_flat, dtype_of
from distnadam.tensors.layout import sizes_of
from distnadam.transport.landed_parameters import LandedParameters
from distnadam.transport.landing_memory import LandingMemory
from distnadam.transport.push_groups import PushGroups
from distnadam.transport.push_parts import PushParts
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_server import ShmServer
from distnadam.transport.tcp_connection import (
    HANDSHAKE_S,
    Endpoint,
    Parts,
    Receiver,
    TcpConnection,
    check_bytes,
    greeting,
    parts_of,
)
from distnadam.transport.tcp_dial import dial, dialling_thread
from distnadam.transport.turns import place_after
from distnadam.transport.unix_connection import Address

log = logging.getLogger("distnadam")

_CLOSE_S = 5.0
_REOPEN_S = 20.0
"""Seconds after which a lost connection is tried again; twice as many after each that fails."""
_MOST_REOPEN_S = 600.0
_HOLD_S = 5.0
"""Seconds that a push waits for its group's others, one of which may stand still."""
_SPARE_SUMS = 2
REMEDY = (
    "Ray objects are used instead, which cost more time: let the hosts of the cluster reach each "
    "other at these ports, or set Options(port_range=...) to some that are open"
)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The ways to a shard.

    Attributes:
        find: returns where it listens; may block, and raises LaneError if it does not listen.
        carry: the carrier of last resort: sends a message, and calls back once, in any thread, with
            the answer, which brings the parameters, or with the error; may block.
    """

    find: Callable[[], Endpoint]
    carry: Callable[[Message | Order, Reply], None]


class FarShard(Receiver):
    """One shard of another host.

    An answer that names a buffer is passed on only while the host's memory holds the parameters
    of its epoch and round there. All but `address` and `close` happens in the thread of
    the connections.

    Args:
        spec: the shard's spec.
        arena: the host's two parameter buffers.
        reach: the ways to the shard.
        number: of this host: it sends to the shard of the next number first.

    Raises:
        LaneError: the system has no socket or thread for it.
    """

    def __init__(self, spec: ShardSpec, arena: Arena, reach: Reach, number: int) -> None:
        arena.populate(spec.ranges)
        self._index = spec.index
        self._sizes = sizes_of(spec.ranges)
        buffers = [cut_flat(flat, spec.ranges) for flat in arena.flats]
        self._parameters = LandedParameters(
            spec.index, buffers, self._sizes, spec.layout.pull_dtypes
        )
        self._reach = reach
        self._number = number
        self._thread = dialling_thread()
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[Message | Order, Reply]] = {}
        self._connection: TcpConnection | None = None
        self._opening: asyncio.Future[None] | None = None
        self._reopen_s = _REOPEN_S
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._said = ""
        self._is_closed = False
        self._carrier = _thread_pool(f"shard-{spec.index}-by-objects")
        self.tried = threading.Event()
        """Whether the connection was opened, or could not be."""
        self._sums = LandingMemory(_SPARE_SUMS + spec.num_workers // spec.config.sum_group)
        self._groups = PushGroups(
            num_workers=spec.num_workers,
            sum_group=spec.config.sum_group,
            send=self._ask,
            connected=lambda: self.workers.ranks,
            lend=lambda: self._sums.lend(self._sizes, {s: dtype_of(s) for s in self._sizes}),
        )
        self._is_summed = spec.config.sum_group > 1
        self._ranges_held = spec.ranges
        self._ahead = PushParts(spec.ranges)  # over the present connection
        self._release: asyncio.TimerHandle | None = None
        self.workers = ShmServer(spec, arena, self._take, self._thread.loop)
        self._thread.call(self._open)

    @property
    def address(self) -> Address:
        """Where workers of this host connect."""
        return self.workers.address

    @property
    def is_by_tcp(self) -> bool:
        """Whether the connection is open."""
        return self._connection is not None

    def close(self) -> None:
        """Hang up on the workers and on the shard, and release their memory; call this from outside
        the loop's thread.
        """
        self.workers.close()
        self._carrier.shutdown(wait=False, cancel_futures=True)
        self._thread.run(self._close(), _CLOSE_S)

    async def _close(self) -> None:
        self._is_closed = True
        for timer in (self._timer, self._release):
            if timer is not None:
                timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.close("the relay needs it no more")
        # objects that refer to each other live on for long, and their memory with them
        self._asked.clear()
        self._groups.clear()
        self._ahead = PushParts(self._ranges_held)
        self._parameters.clear()
        self._sums.clear()

    # From the workers to the shard

    def _take(self, message: Message | Order | PushSlice, reply: Reply, _: RunWork) -> None:
        if isinstance(message, Push):
            self._groups.put(message, reply)
        elif isinstance(message, PushSlice):
            self._send_ahead(message)
        else:
            if isinstance(message, Leave | WorkerDied):
                self._groups.gone(message.rank)
                self._ahead.forget(message.rank)
            self._ask(message, reply)
        if not self._groups.is_waiting and self._release is not None:
            self._release.cancel()
            self._release = None
        elif self._groups.is_waiting and self._release is None:
            self._release = self._thread.loop.call_later(_HOLD_S, self._release_held)

    def _release_held(self) -> None:
        self._release = None
        self._groups.release()

    def _ask(self, message: Message | Order, reply: Reply) -> None:
        if self._connection is None:
            self._carry(message, reply)
            return
        number = next(self._numbers)
        self._asked[number] = message, reply
        parts: Parts = ()
        if isinstance(message, Push) and (rest := self._ahead.rest(message)) is not None:
            _, parts = rest
        elif isinstance(message, Push | GroupPush):
            parts = parts_of(message.gradients or {})
            if isinstance(message, Push) and message.slices:  # sent by another connection, if any
                message = replace(message, slices=0)
        self._connection.send(pack(number, message)[HEADER.size :], parts)

    def _send_ahead(self, part: PushSlice) -> None:
        """Send a slice from the worker's memory; of a group only the sum crosses the cable."""
        if self._connection is None or self._is_summed:
            return
        dtypes = {space: space for space in self._sizes}
        memory = self.workers.gradients_of(part.rank, part.incarnation, dtypes)
        if memory is not None:
            with suppress(LaneError):  # of a former cut: the push will bring it
                parts = self._ahead.add(part, lambda: memory)
                self._connection.send(pack(0, part)[HEADER.size :], parts)

    def _carry(self, message: Message | Order, reply: Reply) -> None:
        if isinstance(message, Push | GroupPush | TotalNorms | Pull):
            message = replace(message, want_parameters=True)

        def carried(answer: Any) -> None:
            self._thread.call(self._carried, reply, answer)

        def send() -> None:
            try:
                self._reach.carry(message, carried)
            except Exception as error:
                self._thread.call(reply, error)

        # in a thread: a large message takes long, and other shards' connections go on meanwhile
        with suppress(RuntimeError):  # closed, and the workers hung up on
            self._carrier.submit(send)

    # From the shard to the workers

    def _carried(self, reply: Reply, answer: Any) -> None:
        if self._is_closed:
            return  # the workers are hung up on, and the memory may be another's now
        if isinstance(answer, RoundResult):
            try:
                if self._connection is not None and self._parameters.is_overtaken_by(answer):
                    self._connection.close("newer parameters came another way")
                self._parameters.put(answer)
                answer = self._parameters.readable(answer)
            except (LaneError, ValueError, KeyError, TypeError) as error:
                answer = error
        reply(answer)

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        number, answer = unpack(message)
        parts: Parts = ()
        if isinstance(answer, RoundResult):
            parts = self._parameters.begin(answer, num_bytes)
        check_bytes(parts, num_bytes)
        return (number, answer), parts

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        number, answer = what
        if number not in self._asked:
            raise LaneError("an answer came to no question")
        _, reply = self._asked.pop(number)
        if isinstance(answer, RoundResult):
            self._parameters.end(answer)
            answer = self._parameters.readable(answer)
        reply(answer)

    # The connection

    def _open(self) -> None:
        if not self._is_closed:
            self._task = self._thread.loop.create_task(self._try_to_open())

    async def _try_to_open(self) -> None:
        where = ""
        connection: TcpConnection | None = None
        try:
            endpoint = await asyncio.to_thread(self._reach.find)
            where = f"shard {self._index} cannot be reached at {endpoint.host} port {endpoint.port}"
            self._opening = self._thread.loop.create_future()
            connection = TcpConnection(self, endpoint.secret, greeting(self._number))
            connection.place = place_after(self._number, self._index)
            await asyncio.to_thread(dial, connection, endpoint)
            await asyncio.wait_for(self._opening, HANDSHAKE_S)
        except Exception as error:  # whatever it is, it is tried again
            why = str(error) or "it did not answer in time"
            self._opening = None
            if connection is not None:
                connection.close(why)
            self._say(f"{where}: {why}" if where else why)
            self._open_later()
        except asyncio.CancelledError:
            if connection is not None:
                connection.close("the relay needs it no more")
            raise
        else:
            self._reopen_s = _REOPEN_S
            log.info(
                "shard %d is reached by TCP at %s port %d",
                self._index,
                endpoint.host,
                endpoint.port,
            )
        finally:
            self.tried.set()

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        self._connection = connection
        self._ahead = PushParts(self._ranges_held)
        assert self._opening is not None
        if not self._opening.done():
            self._opening.set_result(None)

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        if connection is not self._connection:
            if self._opening is not None and not self._opening.done():
                self._opening.set_exception(LaneError(why))
            return
        self._connection = None
        self._parameters.interrupt()
        asked, self._asked = self._asked, {}
        if self._is_closed:
            return
        # no warning yet: it may be the shard that has ended, and is replaced
        log.info("the connection to shard %d has ended: %s", self._index, why)
        self._open_later()
        for message, reply in asked.values():
            self._carry(message, reply)

    def _open_later(self) -> None:
        if self._is_closed:
            return
        self._timer = self._thread.loop.call_later(self._reopen_s, self._open)
        self._reopen_s = min(2 * self._reopen_s, _MOST_REOPEN_S)

    def _say(self, problem: str) -> None:
        """Warn, once for each problem."""
        if problem != self._said:
            log.warning("%s; %s", problem, REMEDY)
            self._said = problem


def _thread_pool(name: str) -> ThreadPoolExecutor:
    """Return a pool of one thread, which is started now, or refused."""
    pool = ThreadPoolExecutor(1, name)
    try:
        pool.submit(bool)
    except RuntimeError as error:
        raise LaneError(f"no thread for connections: {error}") from error
    return pool
