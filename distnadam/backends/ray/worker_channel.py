"""A worker's channel to the shards of a Ray cluster: shared memory with the shards of its own node,
and with its node's relay, which stands for those of others; the transport's objects where there is
none. No Ray here.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from distnadam.backends.base import Pending, Routes, ShardTransport, WorkerChannel
from distnadam.backends.ray.address import ProcessAddress, Relayed
from distnadam.errors import ArenaError, LaneError, ShardLost
from distnadam.planning import room
from distnadam.protocol.messages import Pull, Push, PushSlice, RoundResult, TotalNorms
from distnadam.protocol.round_settings import RoundSettings
from distnadam.tensors.arrays import Dtypes, Flat, empty_flat
from distnadam.tensors.layout import Ranges
from distnadam.transport.available_memory import available_bytes
from distnadam.transport.shm_channel import ShmClient
from distnadam.transport.unix_connection import Address

log = logging.getLogger("distnadam")


_LOOK_EVERY_S = 1.0
"""Seconds between two looks, in a wait for answers, at whether anybody can still answer."""
REMEDY = (
    "Ray objects are used instead, which cost more time: give the node or container more "
    "memory, or run fewer workers on it"
)


@dataclass(frozen=True, kw_only=True)
class ChannelOwner:
    """The worker of a channel, and how the channel learns of the shards.

    Attributes:
        node: the worker's Ray node.
        rank: the worker's rank.
        sizes: elements of the whole model per space.
        addresses: returns where the shards are now; [] if all goes by the transport.
        relayed: has the node's relay stand for the shards of other nodes; returns where, or why it
            does not. Raises ArenaError or LaneError where there is no relay.
        pull_dtypes: the layout's; None for the spaces' own.
    """

    node: str
    rank: int
    sizes: dict[str, int]
    addresses: Callable[[], list[ProcessAddress]]
    relayed: Callable[[], Mapping[int, Relayed | LaneError]]
    pull_dtypes: Dtypes | None = None


class RayWorkerChannel(WorkerChannel):
    """Shared memory with the shards of the worker's node and with its relay, Ray objects to all
    others.

    Args:
        transport: sends Ray objects.
        owner: the worker.
        ranges: what each shard holds.
        incarnation: the worker's incarnation.
    """

    def __init__(
        self,
        transport: ShardTransport,
        owner: ChannelOwner,
        ranges: list[Ranges],
        incarnation: int,
    ) -> None:
        self._transport = transport
        self._owner = owner
        self._ranges = ranges
        self._incarnation = incarnation
        self._shm: ShmClient | None = None
        self._gradients: Flat | None = None
        self._sockets: dict[int, Address] = {}
        self._connected: list[ProcessAddress] = []
        self._last_relayed: dict[int, Relayed] = {}
        self._said: list[str] = []
        self.reconnect(ranges, incarnation)

    @property
    @override
    def gradients(self) -> Flat:
        """Memory shared with shards if there is any at the first use, else this process's own."""
        if self._gradients is None:
            self._gradients = (
                empty_flat(self._owner.sizes) if self._shm is None else self._shm.gradients
            )
        return self._gradients

    @override
    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        """Share memory with the shards of this node, and with the relay for those of others; log
        which shards are reached how, and why others are not.
        """
        addresses = self._owner.addresses()
        if ranges is not self._ranges or incarnation != self._incarnation:
            self._ranges = ranges
            self._incarnation = incarnation
            if self._shm is not None:
                self._shm.reset(ranges, incarnation)
        near = {
            shard: address.socket
            for shard, address in enumerate(addresses)
            if address.node == self._owner.node and address.socket is not None
        }
        relayed = self._still_relayed(addresses) | self._relayed(addresses)
        try:
            if addresses:
                self._share_memory(near, {shard: each.socket for shard, each in relayed.items()})
        except (ArenaError, LaneError) as error:
            log.warning("worker %d: %s; %s", self._owner.rank, error, REMEDY)
        self._connected = addresses
        self._last_relayed = relayed
        shared = set() if self._shm is None else set(self._sockets)
        self.relayed = frozenset(shared & relayed.keys())
        here = sorted(shared & near.keys())
        far = [shard for shard in sorted(self.relayed) if relayed[shard].by_tcp]
        others = [shard for shard in range(len(ranges)) if shard not in (*here, *far)]
        self.routes = Routes(ranges, frozenset(here), frozenset(others))
        log.info(
            "worker %d: shards %s by shared memory (same node), %sshards %s by Ray objects",
            self._owner.rank,
            here or "none",
            f"shards {far} by TCP, " if far else "",
            others or "none",
        )
        self.parameters = None
        if self._shm is not None and self._shm.complete:
            first, second = self._shm.parameters
            self.parameters = (first, second)

    def _still_relayed(self, addresses: list[ProcessAddress]) -> dict[int, Relayed]:
        """Return the shards whose connection by the relay is good, whatever the relay says now.

        The relay would take its end for the worker's death.
        """
        return {
            shard: each
            for shard, each in self._last_relayed.items()
            if self._shm is not None
            and shard in self._shm
            and addresses[shard : shard + 1] == self._connected[shard : shard + 1]
        }

    def _relayed(self, addresses: list[ProcessAddress]) -> dict[int, Relayed]:
        """Return the shards of other nodes that the relay stands for; say why it does not."""
        if all(address.node == self._owner.node for address in addresses):
            return {}
        found: Mapping[int, Relayed | LaneError] = {}
        problems = []
        try:
            found = self._owner.relayed()
        except (ArenaError, LaneError) as error:
            problems = [str(error)]
        problems += [str(each) for each in found.values() if isinstance(each, LaneError)]
        if problems and problems != self._said:
            log.warning("worker %d: %s; %s", self._owner.rank, "; ".join(problems), REMEDY)
        self._said = problems
        return {shard: each for shard, each in found.items() if isinstance(each, Relayed)}

    def _share_memory(self, near: Mapping[int, Address], relayed: Mapping[int, Address]) -> None:
        """Open a channel to each of these sockets, shards' and the relay's, that has none.

        Raises:
            ArenaError, LaneError: one could not be opened.
            InsufficientResources: the node lacks the memory for the worker's gradients.
        """
        sockets = {**near, **relayed}
        # also where none is reached now, as amid a reshard: the gradients stay where they begin
        if self._shm is None and self._gradients is None:
            where = f"worker {self._owner.rank}: node {self._owner.node[:12]}"
            room.check(where, available_bytes(), [room.gradients(self._owner.sizes)])
            self._shm = ShmClient(
                self._owner.sizes,
                self._ranges,
                self._owner.rank,
                self._incarnation,
                self._owner.pull_dtypes,
            )
        if self._shm is None:
            return
        kept = {
            shard: socket
            for shard, socket in self._sockets.items()
            if shard in self._shm and sockets.get(shard) == socket
        }
        for shard in self._sockets.keys() - kept.keys():
            self._shm.drop(shard)
        self._sockets = kept
        for shard, socket in sockets.items():
            if shard not in kept:
                peer = "its process" if shard in near else "the relay of this host"
                self._shm.open(shard, socket, peer)
                self._sockets[shard] = socket

    @override
    def post(
        self, messages: Mapping[int, Push] | Mapping[int, TotalNorms] | Mapping[int, Pull]
    ) -> Pending:
        if not self._sockets:
            return self._transport.post(messages)
        self._transport.require_open()
        assert self._shm is not None
        if lost := [shard for shard in self._sockets if shard not in self._shm]:
            # what a shard answers by objects would leave this node's memory as it is
            raise ShardLost(f"shard {lost[0]}: the connection to it has ended")
        return RayChannelPending(messages, self._shm, self._transport, self.relayed)

    @override
    def post_push(self, push: Push, parts: Sequence[Flat], slices: Mapping[int, int]) -> Pending:
        shm = self._shm
        if shm is None or not shm.complete or slices or push.rejection is not None:
            return super().post_push(push, parts, slices)
        self._transport.require_open()
        return ShmPending(shm, shm.post_push(push, parts), len(parts), self._transport)

    @override
    def step_at_once(
        self,
        epoch: int,
        rank: int,
        incarnation: int,
        round: int,
        parts: Sequence[Flat],
        settings: RoundSettings,
    ) -> RoundResult | Pending | None:
        shm = self._shm
        if shm is None or not shm.complete:
            return None
        self._transport.require_open()
        push = Push(
            epoch=epoch,
            rank=rank,
            incarnation=incarnation,
            round=round,
            gradients=None,
            settings=settings,
        )
        number = shm.post_push(push, parts)
        ended = shm.common_answer(number)
        if type(ended) is RoundResult and ended.round == round and ended.outcome == "applied":
            return ended
        return ShmPending(shm, number, len(parts), self._transport)

    @override
    def send_ahead(self, shard: int, part: PushSlice) -> bool:
        if self._shm is None or shard not in self.relayed or shard not in self._shm:
            return False
        self._shm.tell(shard, part)
        return True

    @override
    def close(self) -> None:
        if self._shm is not None:
            self._shm.close()


class ShmPending(Pending):
    """Answers over shared memory.

    Args:
        shm: reaches the shards of this node, and the relay.
        number: of what was sent.
        count: how many shards were sent it.
        transport: knows whether an answer can still come.
    """

    def __init__(self, shm: ShmClient, number: int, count: int, transport: ShardTransport) -> None:
        self._shm = shm
        self._number = number
        self._count = count
        self._transport = transport

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            look_at = time.monotonic() + _LOOK_EVERY_S
            try:
                return self._shm.collect(self._number, self._count, min(look_at, deadline))
            except TimeoutError:
                if look_at >= deadline:
                    raise
                self._transport.require_open()


class RayChannelPending(Pending):
    """Answers over shared memory and as Ray objects.

    Args:
        messages: what was asked, by shard.
        shm: reaches the shards of this node, and the relay.
        transport: reaches all others, and knows whether an answer can still come.
        relayed: the shards that the relay stands for.
    """

    def __init__(
        self,
        messages: Mapping[int, Push] | Mapping[int, TotalNorms] | Mapping[int, Pull],
        shm: ShmClient,
        transport: ShardTransport,
        relayed: frozenset[int],
    ) -> None:
        self._shm = shm
        self._transport = transport
        self._messages = messages
        self._near = {
            i: m
            for i, m in messages.items()
            if i in relayed or (i in shm and not isinstance(m, Pull))
        }
        rest = {i: m for i, m in messages.items() if i not in self._near}
        number = shm.post(self._near) if self._near else 0
        self._shared = ShmPending(shm, number, len(self._near), transport)
        self._objects = transport.post(rest) if rest else None

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = self._shared.result(timeout_s) if self._near else {}
        if self._objects is not None:
            answers = {i: self._with_parameters(i, answer) for i, answer in answers.items()}
            answers |= self._objects.result(max(0.0, deadline - time.monotonic()))
        return answers

    def _with_parameters(self, shard: int, answer: Any) -> Any:
        if not (self._messages[shard].want_parameters and isinstance(answer, RoundResult)):
            return answer
        return replace(answer, parameters=self._shm.parameters_of(shard, answer))
