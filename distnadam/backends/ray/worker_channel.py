"""A worker's channel to the shards of a Ray cluster: shared memory with the shards of its own node,
TCP to those of others, the transport's objects where neither works. No Ray here.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from distnadam.backends.base import Pending, Routes, ShardTransport, WorkerChannel
from distnadam.backends.ray.address import ProcessAddress
from distnadam.errors import ArenaError, LaneError
from distnadam.protocol.messages import Push, RoundResult, TotalNorms
from distnadam.tensors.arrays import Dtypes, Flat, empty_flat
from distnadam.tensors.layout import Ranges
from distnadam.transport.shm_channel import ShmClient
from distnadam.transport.tcp_client import TcpClient
from distnadam.transport.tcp_connection import Endpoint

log = logging.getLogger("distnadam")


_LOOK_EVERY_S = 1.0
"""Seconds between two looks, in a wait for answers, at whether anybody can still answer."""
_REOPEN_S = 10.0
"""Seconds after which a lost TCP connection is tried again; twice as many after each that fails."""
_MOST_REOPEN_S = 600.0
TCP_REMEDY = (
    "Ray objects are used instead, which cost more time: let the hosts of the cluster reach each "
    "other at these ports, or set Options(port_range=...) to some that are open"
)
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
        endpoints: returns where shards of other nodes listen, or why they do not.
        pull_dtypes: the layout's; None for the spaces' own.
    """

    node: str
    rank: int
    sizes: dict[str, int]
    addresses: Callable[[], list[ProcessAddress]]
    endpoints: Callable[[Collection[int]], Mapping[int, Endpoint | LaneError]]
    pull_dtypes: Dtypes | None = None


class RayWorkerChannel(WorkerChannel):
    """Shared memory with the shards of the worker's node, TCP or Ray objects to all others.

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
        self._tcp = TcpClient(owner.rank, incarnation, owner.pull_dtypes)
        self._reopen_s = _REOPEN_S
        self._reopen_at = 0.0
        self._failures: list[str] = []
        self._gradients: Flat | None = None
        self._connected: list[ProcessAddress] = []
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
        """Share memory with each shard of this node; log which shards do, and why others do not."""
        addresses = self._owner.addresses()
        if ranges is not self._ranges or incarnation != self._incarnation:
            self._ranges = ranges
            self._incarnation = incarnation
            self._connected = []
            self._tcp.reset(incarnation)
            if self._shm is not None:
                self._shm.reset(ranges, incarnation)
        try:
            self._share_memory(addresses)
        except (ArenaError, LaneError) as error:
            log.warning("worker %d: %s; %s", self._owner.rank, error, REMEDY)
        self._open_tcp(addresses)
        self._connected = addresses
        shared = [shard for shard in range(len(ranges)) if self._shares_memory(shard)]
        far = [shard for shard in range(len(ranges)) if shard in self._tcp]
        others = [shard for shard in range(len(ranges)) if shard not in (*shared, *far)]
        log.info(
            "worker %d: shards %s by shared memory (same node), %sshards %s by Ray objects",
            self._owner.rank,
            shared or "none",
            f"shards {far} by TCP, " if far else "",
            others or "none",
        )
        self.routes = Routes(ranges, frozenset(shared), frozenset(others))
        if not shared and self._gradients is None:
            self._shm = None
        self.parameters = None
        if self._shm is not None and self._shm.complete:
            first, second = self._shm.parameters
            self.parameters = (first, second)

    def _share_memory(self, addresses: list[ProcessAddress]) -> None:
        """Open a channel to each shard of this node that moved or has none.

        Raises:
            ArenaError, LaneError: one could not be opened.
        """
        changed = [
            shard
            for shard, address in enumerate(addresses)
            if self._connected[shard : shard + 1] != [address] or not self._shares_memory(shard)
        ]
        near = {
            shard: socket
            for shard in changed
            if addresses[shard].node == self._owner.node
            and (socket := addresses[shard].socket) is not None
        }
        if near and self._shm is None and self._gradients is None:
            self._shm = ShmClient(
                self._owner.sizes,
                self._ranges,
                self._owner.rank,
                self._incarnation,
                self._owner.pull_dtypes,
            )
        if self._shm is None:
            return
        for shard in changed:
            self._shm.drop(shard)
        for shard, socket in near.items():
            self._shm.open(shard, socket)

    def _open_tcp(self, addresses: list[ProcessAddress]) -> None:
        """Connect to each shard of another node that moved or has no connection."""
        far = [
            shard
            for shard, address in enumerate(addresses)
            if address.node != self._owner.node
            and (self._connected[shard : shard + 1] != [address] or shard not in self._tcp)
        ]
        failures = []
        for shard, endpoint in (self._owner.endpoints(far) if far else {}).items():
            try:
                if isinstance(endpoint, LaneError):
                    raise endpoint
                self._tcp.open(shard, endpoint, self._ranges[shard])
            except LaneError as error:
                failures.append(str(error))
        # a firewall lets each try wait until it times out
        self._reopen_s = min(2 * self._reopen_s, _MOST_REOPEN_S) if failures else _REOPEN_S
        self._reopen_at = time.monotonic() + self._reopen_s
        if failures and failures != self._failures:
            log.warning("worker %d: %s; %s", self._owner.rank, "; ".join(failures), TCP_REMEDY)
        self._failures = failures

    def _shares_memory(self, shard: int) -> bool:
        return self._shm is not None and shard in self._shm

    @override
    def post(self, messages: Mapping[int, Push] | Mapping[int, TotalNorms]) -> Pending:
        if not self._connected:
            return self._transport.post(messages)
        self._transport.require_open()
        if time.monotonic() >= self._reopen_at:
            self._open_tcp(self._connected)
        return RayChannelPending(messages, self._shm, self._tcp, self._transport)

    @override
    def close(self) -> None:
        self._tcp.close()
        if self._shm is not None:
            self._shm.close()


class RayChannelPending(Pending):
    """Answers over shared memory, over TCP and as Ray objects.

    A message whose TCP connection is lost goes by the transport: the shard counts a push once.

    Args:
        messages: what was asked, by shard.
        shm: reaches the shards that share memory; None if none do.
        tcp: reaches shards of other nodes.
        transport: reaches all others, and knows whether an answer can still come.
    """

    def __init__(
        self,
        messages: Mapping[int, Push] | Mapping[int, TotalNorms],
        shm: ShmClient | None,
        tcp: TcpClient,
        transport: ShardTransport,
    ) -> None:
        self._shm = shm
        self._tcp = tcp
        self._transport = transport
        self._messages = messages
        self._near = {i: m for i, m in messages.items() if shm is not None and i in shm}
        self._far = {i: m for i, m in messages.items() if i not in self._near and i in tcp}
        rest = {i: m for i, m in messages.items() if i not in self._near and i not in self._far}
        self._tcp_number = tcp.post(self._far) if self._far else 0
        self._shm_number = shm.post(self._near) if shm is not None and self._near else 0
        self._objects = [transport.post(rest)] if rest else []

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        if self._shm is not None and self._near:
            collect, number = self._shm.collect, self._shm_number
            answers |= self._await(lambda until: collect(number, len(self._near), until), deadline)
        if len(self._near) < len(self._messages):
            answers |= {i: self._with_parameters(i, answer) for i, answer in answers.items()}
        if self._far:
            number = self._tcp_number
            answers |= self._await(
                lambda until: self._tcp.collect(number, self._far, until), deadline
            )
            if lost := {i: m for i, m in self._far.items() if answers[i] is None}:
                self._far = {i: m for i, m in self._far.items() if i not in lost}
                self._objects.append(self._transport.post(lost))
        for pending in self._objects:
            answers |= pending.result(max(0.0, deadline - time.monotonic()))
        return answers

    def _with_parameters(self, shard: int, answer: Any) -> Any:
        wanted = self._messages[shard].want_parameters and isinstance(answer, RoundResult)
        if self._shm is None or not wanted:
            return answer
        return replace(answer, parameters=self._shm.parameters_of(shard, answer))

    def _await(self, collect: Callable[[float], dict[int, Any]], deadline: float) -> dict[int, Any]:
        while True:
            look_at = time.monotonic() + _LOOK_EVERY_S
            try:
                return collect(min(look_at, deadline))
            except TimeoutError:
                if look_at >= deadline:
                    raise
                self._transport.require_open()
