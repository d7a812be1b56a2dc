"""A shard, or its standby, as a Ray actor.

Messages come as calls, over shared memory and by TCP; a standby follows its primary over shared
memory on one node, by TCP or calls between nodes. The protocol is decided in `runtime`, not here.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray

from distnadam.backends.ray import registry, stored_restore_points
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.calls import retry_in_background
from distnadam.backends.ray.lease import Lease, lease_s
from distnadam.backends.ray.metrics_exporter import Exporter
from distnadam.backends.ray.nodes import node_facts
from distnadam.backends.ray.object_replication import OrderedStream
from distnadam.backends.ray.orphans import on_end_of
from distnadam.backends.ray.standby_connector import StandbyConnector
from distnadam.errors import ArenaError, ClusterError, LaneError
from distnadam.metrics.meter import shard_bytes
from distnadam.planning import room
from distnadam.protocol.messages import Describe, Message, Read, ShardSpec
from distnadam.protocol.supervisor_events import StandbyLost
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Load,
    Order,
    Reconfigure,
    Record,
    ReplicatedRound,
    ShardControlState,
)
from distnadam.runtime.shard_host import ShardHost
from distnadam.runtime.standby import Standby
from distnadam.shard.effects import Notice
from distnadam.supervision.discovery import DiscoveredProcess
from distnadam.supervision.process_manager import ShardProcess
from distnadam.tensors.arrays import Array, Flat, cut_flat, empty_flat, memory_for
from distnadam.tensors.copy_plan import Copy
from distnadam.tensors.layout import sizes_of
from distnadam.transport.available_memory import available_bytes
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_replication import StandbyReceiver
from distnadam.transport.shm_server import ShmServer, parameter_arena
from distnadam.transport.tcp_connection import Endpoint
from distnadam.transport.tcp_replication import TcpStandbyReceiver
from distnadam.transport.tcp_server import TcpServer
from distnadam.transport.traffic import host_traffic
from distnadam.transport.unix_connection import Address

log = logging.getLogger("distnadam")

_DRAIN_S = 10.0


class ShardActor:
    """One shard, or its standby, in a process of its own.

    Heavy work runs in a thread beside the event loop, so that the actor always answers. Methods
    that name a role are only for an actor that has it.
    """

    def __init__(self, spec: ShardSpec, supervisor: Any) -> None:
        self._spec = spec
        self._supervisor = supervisor
        self._executor = ThreadPoolExecutor(1, "shard")
        self._address = registry.register(spec.run_id)
        self._threads = spec.options.threads or max(1, int(spec.options.shard_cpus))
        self._arena: Arena | None = None
        self._host: ShardHost | None = None
        self._standby: Standby | None = None
        self._receiver: StandbyReceiver | None = None
        self._far_receiver: TcpStandbyReceiver | None = None
        self._tcp: TcpServer | None = None
        self._lease: Lease | None = None
        self._connector = StandbyConnector(spec)
        self._stream = OrderedStream()
        self._landing: dict[str, Flat] = {}
        self._exporter = Exporter.start(spec.name, spec.options)
        if spec.name is not None:  # else it is the supervisor's child, which ends with it
            on_end_of(supervisor, spec.name, self._end_as_orphan)

    async def about(self) -> dict[str, str]:
        """Return this process's node, id and package versions."""
        return node_facts()

    async def open(
        self, neighbour: Address | None, *, standby: bool = False, promised: int = 0
    ) -> ProcessAddress:
        """Reserve memory, begin to serve or to follow, and return where; idempotent.

        Args:
            neighbour: a shard of this node whose parameter memory is to be shared; None for new
                memory.
            standby: whether to follow a primary.
            promised: bytes that others of this node, begun before, are still to take.

        Raises:
            InsufficientResources: the node has not that much memory.
        """
        if self._host is None and self._standby is None:
            self._check_memory(neighbour, standby=standby, promised=promised)
            with memory_for(
                f"shard {self._spec.index}: its state of {shard_bytes(self._spec)} bytes"
            ):
                self._open(neighbour, standby=standby)
        return self._address

    def _check_memory(self, neighbour: Address | None, *, standby: bool, promised: int) -> None:
        needs = [room.standby(self._spec) if standby else room.state([self._spec])]
        if neighbour is None and not standby:
            needs.append(room.buffers(self._spec.layout))
        where = f"shard {self._spec.index}: node {self._address.node[:12]}"
        room.check(where, available_bytes() - promised, needs)

    def _open(self, neighbour: Address | None, *, standby: bool) -> None:
        if standby:
            self._standby = follower = Standby(self._spec, self._threads)
            self._receiver = StandbyReceiver(self._spec, follower.map_states, follower.apply)
            self._address = dataclasses.replace(self._address, socket=self._receiver.address)
            if neighbour is not None:
                self._share_memory(neighbour)
            return
        self._share_memory(neighbour)
        host = self._make_host(self._spec)
        self._serve(host)
        self._host = host

    async def address(self) -> ProcessAddress:
        """Return this process and where its connections are accepted."""
        return self._address

    async def listen(self) -> Endpoint:
        """Listen for the relays of other nodes, from the first call on; return where.

        Raises:
            LaneError: it cannot.
        """
        if self._host is None:
            raise LaneError(f"shard {self._spec.index}: this process is a standby")
        if self._tcp is None:
            host, ports = ray.util.get_node_ip_address(), self._spec.options.port_range
            self._tcp = TcpServer(self._spec, self._host.deliver, host, ports)
        return self._tcp.endpoint

    async def follow(self) -> Endpoint:
        """Standby: listen for a primary on another node, from the first call on; return where.

        Raises:
            LaneError: it cannot.
        """
        if self._standby is None:
            raise LaneError(f"shard {self._spec.index}: this process is no standby any more")
        if self._far_receiver is None:
            self._far_receiver = TcpStandbyReceiver(
                self._spec.index,
                sizes_of(self._spec.ranges),
                self._spec.config.state_arrays,
                self._standby.take_arrays,
                self._standby.apply,
                ray.util.get_node_ip_address(),
                self._spec.options.port_range,
            )
        return self._far_receiver.endpoint

    async def introduce(self) -> DiscoveredProcess:
        """Return what a supervisor that takes over must know of this process."""
        process = ShardProcess(self._spec.index, None, self._address)
        if self._standby is not None:
            return DiscoveredProcess(
                process=process, spec=self._spec, standby=True, reached=self._standby.reached
            )
        if self._host is None:  # made by a supervisor that died before it was opened
            return DiscoveredProcess(process=process, spec=self._spec, retired=True)
        description = await self.send(Describe())
        return DiscoveredProcess(
            process=process,
            spec=self._spec,
            epoch=description.epoch,
            retired=description.retired,
        )

    async def send(self, message: Message | Order) -> Any:
        """Return the shard's answer to a message."""
        if self._host is None:
            raise ClusterError(f"shard {self._spec.index}: this process is a standby")
        return await asyncio.wrap_future(self._host.send(message))

    async def part(self, token: str, copy: Copy) -> list[Any]:
        """Return some elements of each of the paused shard's arrays, in order."""
        assert self._host is not None
        begin = self._spec.ranges[copy.space][0]
        names = self._spec.config.state_arrays
        arrays = await asyncio.wrap_future(self._host.send(Read(token, names)))
        return [arrays[name][copy.space][copy.begin - begin : copy.end - begin] for name in names]

    async def install(self, order: Load, plan: Sequence[Copy], *parts: Any) -> Any:
        """Load a state assembled from other shards' parts, which `plan` places."""
        sizes = sizes_of(self._spec.ranges)
        state = {name: empty_flat(sizes) for name in self._spec.config.state_arrays}
        for copy, part in zip(plan, parts, strict=True):
            first = self._spec.ranges[copy.space][0]
            for flat, values in zip(state.values(), part, strict=True):
                flat[copy.space][copy.begin - first : copy.end - first] = values
        return await self.send(dataclasses.replace(order, state=state))

    async def control_state(self) -> ShardControlState:
        """Return the paused shard's control state."""
        assert self._host is not None
        return self._host.control_state

    async def linger(self) -> None:
        """Return after a while: a call that fails before is the end of the process."""
        await asyncio.sleep(self._spec.options.shard_timeout_s)

    async def begin(self, control_state: ShardControlState, config: Any) -> None:
        """Standby: begin to follow at this control state; the arrays have come already."""
        assert self._standby is not None
        self._standby.begin(control_state, config)

    async def fill(
        self, stream: int, number: int, name: str, space: str, begin: int, values: Array
    ) -> None:
        """Standby: take some elements of a primary's state, by a stream of calls with this id."""
        assert self._standby is not None
        await self._stream.turn(stream, number)
        if number == 0:  # in the executor, after the work that an earlier stream began
            apply = self._standby.apply
            await asyncio.wrap_future(self._executor.submit(apply, DetachStandby(), {}))
            sizes = sizes_of(self._spec.ranges)
            self._landing = {name: empty_flat(sizes) for name in self._spec.config.state_arrays}
        self._landing[name][space][begin : begin + values.size] = values
        self._stream.done(number)

    async def begin_by_calls(
        self, stream: int, number: int, control_state: ShardControlState, config: Any
    ) -> None:
        """Standby: begin to follow at this control state, whose arrays `fill` has brought."""
        assert self._standby is not None
        await self._stream.turn(stream, number)
        self._standby.take_arrays(self._landing)
        self._landing = {}
        self._standby.begin(control_state, config)
        self._stream.done(number)

    async def replicate(self, stream: int, number: int, record: Record, *means: Any) -> int:
        """Standby: apply a record of a primary on another node, after those before it.

        Calls may overtake each other; `number` is the record's place in the stream.
        """
        assert self._standby is not None
        await self._stream.turn(stream, number)
        mean = dict(zip(sorted(self._spec.ranges), means, strict=True)) if means else {}
        await asyncio.wrap_future(self._executor.submit(self._standby.apply, record, mean))
        self._stream.done(number)
        return record.round if isinstance(record, ReplicatedRound) else -1

    async def release(self, stream: int) -> None:
        """Standby: follow this stream no further, and do not take over for its primary."""
        assert self._standby is not None
        if self._stream.end(stream):
            self._standby.apply(DetachStandby(), {})

    async def reached(self) -> int | None:
        """Standby: return the last round it has, once all records of a dead primary are applied."""
        if self._standby is None:
            return None
        if self._receiver is not None:
            await asyncio.to_thread(self._receiver.ended.wait, _DRAIN_S)
        await self._stop_following()
        return None if self._standby is None else self._standby.reached

    async def _stop_following(self) -> None:
        """Take nothing by TCP any more: what is said to be reached is what will be promoted.

        A dead primary's records that count have come whole; the end of its connection may take
        seconds.
        """
        if self._far_receiver is not None:
            await asyncio.to_thread(self._far_receiver.close)

    async def promote(self, reconfigure: Reconfigure, neighbour: Address | None) -> ProcessAddress:
        """Standby: become the shard and return where it serves; idempotent."""
        await self._stop_following()
        if self._host is not None:
            return self._address
        assert self._standby is not None
        if self._arena is None or neighbour is not None:
            self._share_memory(neighbour)
        standby, self._standby = self._standby, None
        self._host, _ = standby.promote(reconfigure, self._make_host)
        self._serve(self._host)  # the receiver's socket stays: the supervisor watches it
        return self._address

    def _share_memory(self, neighbour: Address | None) -> None:
        self._address = dataclasses.replace(self._address, reason=None)
        if self._spec.options.transport != "auto":
            return
        try:
            self._arena = parameter_arena(self._spec, neighbour)
        except (ArenaError, LaneError) as error:
            self._address = dataclasses.replace(
                self._address, reason=f"shard {self._spec.index}: {error}"
            )

    def _make_host(self, spec: ShardSpec) -> ShardHost:
        buffers = None
        if self._arena is not None:
            first, second = (cut_flat(flat, spec.ranges) for flat in self._arena.flats)
            buffers = (first, second)
        host = ShardHost(
            spec,
            buffers=buffers,
            threads=self._threads,
            run_work=self._executor.submit,
            on_notice=self._notice,
            can_send=lambda: self._lease is not None and self._lease.valid,
        )
        host.connect_standby = partial(self._connector.connect, self._address.node, self._arena)
        host.traffic_of = host_traffic().by_host
        host.links_of = host_traffic().delivery_rates
        if self._exporter is not None:
            host.attach_meter(self._exporter.meter)
        return host

    def _serve(self, host: ShardHost) -> None:
        """Keep a lease, and accept workers' connections."""
        self._lease = Lease(self._lease_s, self._ask_for_lease, host.resume, self._end)
        if self._arena is None:
            self._address = dataclasses.replace(self._address, socket=None)
            return
        try:
            server = ShmServer(self._spec, self._arena, host.deliver, at_once=host)
        except LaneError as error:  # workers come by Ray's objects then
            reason = f"shard {self._spec.index}: {error}"
            self._address = dataclasses.replace(self._address, socket=None, reason=reason)
            return
        host.gradients_of = server.gradients_of
        self._address = dataclasses.replace(self._address, socket=server.address)

    @property
    def _lease_s(self) -> float:
        return lease_s(self._spec.options.shard_timeout_s)

    def _ask_for_lease(self, lost: Sequence[ShardProcess]) -> bool | None:
        who = ray.get_runtime_context().get_actor_id()
        answer: bool | None = ray.get(
            self._supervisor.lease.remote(who, lost), timeout=self._lease_s
        )
        return answer

    def _end(self) -> None:
        log.error(
            "shard %d: another has taken its place while it could not be reached; this process "
            "ends",
            self._spec.index,
        )
        os._exit(1)

    def _end_as_orphan(self) -> None:
        log.info("shard %d: its supervisor has ended, and so does it", self._spec.index)
        with contextlib.suppress(Exception):  # the cluster ends as well
            registry.forget(self._spec.run_id, [self._address])
        with contextlib.suppress(Exception):
            stored_restore_points.forget(self._spec.run_id)
        os._exit(0)

    def _notice(self, notice: Notice) -> None:
        if isinstance(notice.report, StandbyLost) and self._lease is not None:
            # the standby may not know that it is stale: no answer leaves before the supervisor does
            self._lease.invalidate(notice.report.standby)
        retry_in_background(lambda: self._supervisor.notify.remote(notice.report))
