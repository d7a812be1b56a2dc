"""A shard's end of the connections to other hosts: gradients come in, parameters go out.

A host's relay has one connection for all its workers, on which the parameters of a round go once:
who asks later gets the answer without them. What is sent is a copy, since a worker may leave before
its host has got them, and the shard steps on.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from typing_extensions import override

from distnadam.errors import LaneError
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.delivery import Deliver, portable, run_in_this_thread
from distnadam.protocol.frames import HEADER
from distnadam.protocol.messages import (
    GroupPush,
    Leave,
    Pull,
    Push,
    PushSlice,
    RoundResult,
    ShardSpec,
    TotalNorms,
    WorkerDied,
)
from distnadam.tensors.arrays import Flat, dtype_of
from distnadam.tensors.layout import sizes_of
from distnadam.transport.landing_memory import LandingMemory
from distnadam.transport.push_parts import PushParts
from distnadam.transport.tcp_connection import (
    Endpoint,
    Parts,
    Receiver,
    TcpConnection,
    check_bytes,
    parts_of,
)
from distnadam.transport.tcp_listener import TcpListener
from distnadam.transport.turns import place_after

_SPARE = 2

_Asking = Push | GroupPush | TotalNorms | Pull
_Key = tuple[int, int, int]
"""Epoch, round and buffer: one shard has the same parameters wherever these are equal."""


class TcpServer(Receiver):
    """One shard's end of its connections to the relays of other hosts.

    Args:
        spec: the shard's spec.
        deliver: called with each message in the server's own thread, which also runs its work.
        host: the address to listen at.
        ports: the first and the last port to try; None for any.

    Raises:
        LaneError: it cannot listen there.
    """

    def __init__(
        self,
        spec: ShardSpec,
        deliver: Deliver,
        host: str,
        ports: tuple[int, int] | None,
    ) -> None:
        self._spec = spec
        self._deliver = deliver
        self._sizes = sizes_of(spec.ranges)
        self._sent: dict[TcpConnection, _Key | None] = {}  # to each relay, the last
        self._ahead: dict[TcpConnection, PushParts] = {}
        self._lock = threading.Lock()
        # what each worker sends, and what one sends too early or again
        self._landing = LandingMemory(spec.num_workers + _SPARE)
        self._copies = LandingMemory(_SPARE)
        self._copied: tuple[_Key, Flat] | None = None
        self._listener = TcpListener(self, f"shard {spec.index}", host, ports)

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return self._listener.endpoint

    @override
    def proven(self, connection: TcpConnection, greeting: Mapping[str, Any]) -> None:
        number = greeting.get("relay")
        if not isinstance(number, int):
            raise LaneError("it is no relay")
        self._listener.admit(connection)
        self._sent[connection] = None
        self._ahead[connection] = PushParts(self._spec.ranges)
        connection.place = place_after(self._spec.index, number)

    @override
    def landing(
        self, connection: TcpConnection, message: bytes, num_bytes: int
    ) -> tuple[Any, Parts]:
        number, what = unpack(message, self._gradients)
        if not isinstance(what, _Asking | PushSlice | Leave | WorkerDied):
            raise LaneError(f"a relay sent {type(what).__name__}")
        ahead = self._ahead[connection]
        parts: Parts = ()
        if isinstance(what, Leave | WorkerDied):
            ahead.forget(what.rank)
        elif isinstance(what, PushSlice):
            if not 0 <= what.rank < self._spec.num_workers:
                raise LaneError(f"a slice of rank {what.rank}, of which there is none")
            parts = ahead.add(what, lambda: self._gradients({s: s for s in self._sizes}))
        elif isinstance(what, Push) and (rest := ahead.rest(what)) is not None:
            gradients, parts = rest
            what = replace(what, gradients=gradients)
        elif isinstance(what, Push) and what.slices:
            raise LaneError(f"rank {what.rank}: {what.slices} slices of its push did not come")
        elif isinstance(what, Push | GroupPush):
            parts = parts_of(what.gradients or {})
        check_bytes(parts, num_bytes)
        return (number, what), parts

    def _gradients(self, dtypes: Mapping[str, str]) -> Flat:
        """Return memory for gradients of these dtypes.

        Raises:
            LaneError: they are not of the shard's spaces.
        """
        if set(dtypes) != set(self._sizes):
            raise LaneError(f"gradients of {sorted(dtypes)}, expected {sorted(self._sizes)}")
        land = {space: dtype_of(name) for space, name in dtypes.items()}
        if any(dtype.itemsize > dtype_of(space).itemsize for space, dtype in land.items()):
            raise LaneError(f"gradients in {dtypes} are wider than the parameters")
        return self._landing.lend(self._sizes, land)

    @override
    def arrived(self, connection: TcpConnection, what: Any) -> None:
        number, message = what
        if isinstance(message, PushSlice):
            return
        if isinstance(message, _Asking):
            message = replace(message, want_parameters=True)
        self._deliver(message, partial(self._answer, connection, number), run_in_this_thread)

    @override
    def ended(self, connection: TcpConnection, why: str) -> None:
        self._listener.forget(connection)
        self._sent.pop(connection, None)
        self._ahead.pop(connection, None)

    def _answer(self, connection: TcpConnection, number: int, answer: Any) -> None:
        """Send an answer, with the parameters that it has; in any thread."""
        answer = portable(answer)
        key: _Key | None = None
        parts: Parts = ()
        if isinstance(answer, RoundResult) and answer.parameters is not None:
            key = (answer.epoch, answer.round, answer.buffer)
            try:
                parts = parts_of(self._copy(key, answer.parameters))
            except MemoryError:  # of this host alone: it asks again by another carrier
                why = "no memory for a copy of the parameters"
                self._listener.thread.call(connection.close, why)
                return
        body = pack(number, answer)[HEADER.size :]
        self._listener.thread.call(self._send, connection, body, key, parts)

    def _send(self, connection: TcpConnection, body: bytes, key: _Key | None, parts: Parts) -> None:
        if connection not in self._sent:
            return
        if key is not None and self._sent[connection] == key:
            parts = ()
        elif key is not None:
            self._sent[connection] = key
        connection.send(body, parts)

    def _copy(self, key: _Key, parameters: Flat) -> Flat:
        with self._lock:
            if self._copied is None or self._copied[0] != key:
                self._copied = None
                dtypes = {space: values.dtype for space, values in parameters.items()}
                copy = self._copies.lend(self._sizes, dtypes)
                for space, values in parameters.items():
                    np.copyto(copy[space], values)
                self._copied = key, copy
            return self._copied[1]

    def close(self) -> None:
        """Stop listening and close the connections."""
        self._listener.close()
