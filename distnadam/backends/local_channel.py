"""Messages to the shards of this process, as calls of their hosts. No Ray."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from typing_extensions import override

from distnadam.backends.base import Pending, WorkerChannel
from distnadam.errors import Reconfigured
from distnadam.protocol.messages import Message, Pull, Push, RoundResult, Step, TotalNorms
from distnadam.protocol.round_settings import RoundSettings
from distnadam.protocol.supervisor_messages import Order
from distnadam.runtime.alone_ahead import RoundsAlone
from distnadam.runtime.shard_host import ShardHost
from distnadam.shield import get_or_interrupt
from distnadam.tensors.arrays import Flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from distnadam.transport.parameter_memory import ParameterMemory


class LocalShards(Protocol):
    """The shards' hosts of now, with what steps their rounds at once, and the parameters that they
    write.
    """

    hosts: list[ShardHost]
    rounds: list[RoundsAlone]
    memory: ParameterMemory


def _copied(answer: Any) -> Any:
    """Return an answer with the parameters as they are now, if it brings them."""
    if isinstance(answer, RoundResult) and answer.parameters is not None:
        return replace(answer, parameters={s: p.copy() for s, p in answer.parameters.items()})
    return answer


class LocalPending(Pending):
    """The answers of hosts of this process to messages, which get there when it is made."""

    def __init__(self, shards: LocalShards, messages: Mapping[int, Message | Order]) -> None:
        hosts, rounds = shards.hosts, shards.rounds
        if any(index >= len(hosts) for index in messages):
            raise Reconfigured(f"there are {len(hosts)} shards now; look again")
        self._count = len(messages)
        self._answers: dict[int, Any] = {}
        self._arrived: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        arrived, memory = self._arrived.put, shards.memory
        keep = _copied if memory.read is None else None
        try:
            memory.inside.add(self)
            if memory.forks != memory.settled:
                memory.settle(self)
            for index, message in messages.items():
                if keep is None and isinstance(message, (Push, Step)):
                    try:
                        result = rounds[index].step_at_once(message)
                    except Exception as error:
                        arrived((index, error))
                        continue
                    if result is not None:
                        self._answers[index] = result
                        continue
                hosts[index].deliver(
                    message, partial(lambda i, a: arrived((i, keep(a) if keep else a)), index)
                )
        finally:
            memory.inside.discard(self)

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        while len(self._answers) < self._count:
            try:
                if self._arrived.empty():
                    index, answer = get_or_interrupt(self._arrived, deadline - time.monotonic())
                else:
                    index, answer = self._arrived.get_nowait()
            except Empty:
                raise TimeoutError from None
            if isinstance(answer, BaseException):
                raise answer
            self._answers[index] = answer
        return self._answers


class LocalWorkerChannel(WorkerChannel):
    """This process's memory: shards read gradients where the worker wrote them, and the worker
    reads the shards' parameters, in pages that it cannot write.
    """

    def __init__(self, shards: LocalShards, layout: Layout) -> None:
        self._shards = shards
        self._gradients = empty_flat(layout.sizes)
        self.parameters = shards.memory.read
        self.written_here = [x for flat in self.parameters or () for x in flat.values()]

    @property
    @override
    def gradients(self) -> Flat:
        return self._gradients

    @override
    def post(
        self, messages: Mapping[int, Push] | Mapping[int, TotalNorms] | Mapping[int, Pull]
    ) -> Pending:
        return LocalPending(self._shards, messages)

    @override
    def step_at_once(
        self,
        epoch: int,
        rank: int,
        incarnation: int,
        round: int,
        parts: Sequence[Flat],
        settings: RoundSettings,
    ) -> RoundResult | None:
        rounds, memory = self._shards.rounds, self._shards.memory
        if memory.read is None or len(rounds) != len(parts):
            return None
        first: RoundResult | None = None
        try:
            memory.inside.add(self)
            if memory.forks != memory.settled:
                memory.settle(self)
            for each, part in zip(rounds, parts, strict=True):
                found = each.step_at_once(
                    Push(
                        epoch=epoch,
                        rank=rank,
                        incarnation=incarnation,
                        round=round,
                        gradients=part,
                        settings=settings,
                    )
                )
                if found is None or found.round != round:
                    return None
                if first is not None and found != first:
                    return None
                first = found
        finally:
            memory.inside.discard(self)
        return first

    @override
    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        """Do nothing: the memory is the same wherever it is cut."""

    @override
    def close(self) -> None:
        """Do nothing: the garbage collector frees the memory."""
