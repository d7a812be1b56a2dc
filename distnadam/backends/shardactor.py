"""A shard, or its standby, as it lives in a Ray actor: messages by calls and lanes, a standby followed by lane or by calls."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from distnadam.arrays import Flat, cut_flat, empty_flat
from distnadam.backends.cluster import node_facts
from distnadam.backends.exporter import Exporter
from distnadam.backends.host import ShardHost
from distnadam.backends.link import Place
from distnadam.backends.standby import Standby
from distnadam.checkpoint.format import ARRAYS
from distnadam.errors import ArenaError, ClusterError, LaneError
from distnadam.messages import Message, Read, ShardSpec
from distnadam.orders import LetGo, Load, Order, Record, Reign, Replicated, Standing
from distnadam.reshard import Copy
from distnadam.supervision.crew import Hired
from distnadam.transitions import Notice
from distnadam.transport.arena import Arena
from distnadam.transport.doorbell import Address
from distnadam.transport.lanes import LaneServer, parameter_arena
from distnadam.transport.replica import LaneFollower, LaneReplica, Replica

_DRAIN_S = 10.0
_LET_GO_S = 1.0


class ShardActor:
    """One shard, or its standby, in a process of its own; heavy work runs beside the event loop, so that it always answers."""

    def __init__(self, spec: ShardSpec, supervisor: Any) -> None:
        self._spec, self._supervisor = spec, supervisor
        self._executor = ThreadPoolExecutor(1, "shard")
        self._place = Place(ray.get_runtime_context().get_node_id())
        self._threads = spec.options.threads or max(1, int(spec.options.shard_cpus))
        self._arena: Arena | None = None
        self._host: ShardHost | None = None
        self._standby: Standby | None = None
        self._follower: LaneFollower | None = None
        self._exporter = Exporter.start(spec.name, spec.options)

    async def about(self) -> dict[str, str]:
        """Return what `node_facts` says here."""
        return node_facts()

    async def open(self, neighbour: Address | None, *, standby: bool = False) -> Place:
        """Get memory, a neighbour's where it has some to share, and begin to serve, or to follow."""
        if standby:
            self._standby = Standby(self._spec, self._threads)
            sizes = {space: end - begin for space, (begin, end) in self._spec.ranges.items()}
            self._follower = LaneFollower(sizes, self._standby.take_arrays, self._standby.apply)
            self._place = dataclasses.replace(self._place, address=self._follower.address)
            if neighbour is not None:
                self._share_memory(neighbour)
            return self._place
        self._share_memory(neighbour)
        self._host = self._make_host(self._spec)
        self._serve(self._host)
        return self._place

    async def place(self) -> Place:
        """Return where this is to be called."""
        return self._place

    async def stands_by(self) -> bool:
        """Return whether this is a standby."""
        return self._host is None

    async def send(self, message: Message | Order) -> Any:
        """Give the shard a message and return its answer."""
        if self._host is None:
            raise ClusterError(f"shard {self._spec.index}: this process is a standby")
        return await asyncio.wrap_future(self._host.send(message))

    async def part(self, token: str, copy: Copy) -> list[Any]:
        """Return the held shard's "params", "m" and "v" of some elements."""
        assert self._host is not None
        begin = self._spec.ranges[copy.space][0]
        arrays = await asyncio.wrap_future(self._host.send(Read(token, ARRAYS)))
        return [arrays[name][copy.space][copy.begin - begin : copy.end - begin] for name in ARRAYS]

    async def install(self, order: Load, plan: Sequence[Copy], *parts: Any) -> Any:
        """Load a state that is put together of other shards' parts."""
        sizes = {space: end - begin for space, (begin, end) in self._spec.ranges.items()}
        state = {name: empty_flat(sizes) for name in ARRAYS}
        for copy, part in zip(plan, parts, strict=True):
            first = self._spec.ranges[copy.space][0]
            for name, values in zip(ARRAYS, part, strict=True):
                state[name][copy.space][copy.begin - first : copy.end - first] = values
        return await self.send(dataclasses.replace(order, state=state))

    async def standing(self) -> Standing:
        """Return where the held shard stands."""
        assert self._host is not None
        return self._host.standing

    async def forever(self) -> None:
        """Never return, so that the call's end tells that this process ended."""
        await asyncio.Event().wait()

    async def begin(self, standing: Standing, config: Any, *arrays: Any) -> None:
        """Standby: take the place in time of the arrays; those come here where the primary is on another node."""
        assert self._standby is not None
        if arrays:
            spaces = sorted(self._spec.ranges)
            named = [dict(zip(spaces, arrays[i::3], strict=True)) for i in range(3)]
            copied = [{space: values.copy() for space, values in flat.items()} for flat in named]
            self._standby.take_arrays(dict(zip(("params", "m", "v"), copied, strict=True)))
        self._standby.begin(standing, config)

    async def replicate(self, record: Record, *means: Any) -> int:
        """Standby: take a record from a primary on another node."""
        assert self._standby is not None
        standby, mean = self._standby, dict(zip(sorted(self._spec.ranges), means, strict=True)) if means else {}
        await asyncio.wrap_future(self._executor.submit(standby.apply, record, mean))
        return record.round if isinstance(record, Replicated) else -1

    async def reached(self) -> int | None:
        """Standby: the round that it has reached, once all that a dead primary sent is applied."""
        if self._standby is None:
            return None
        if self._follower is not None:
            await asyncio.to_thread(self._follower.ended.wait, _DRAIN_S)
        return self._standby.reached

    async def promote(self, reign: Reign, neighbour: Address | None) -> Place:
        """Standby: become the shard."""
        assert self._standby is not None
        if self._arena is None or neighbour is not None:
            self._share_memory(neighbour)
        standby, self._standby = self._standby, None
        self._host, _ = standby.promote(reign, self._make_host)
        self._serve(self._host)  # the follower's socket stays, for who watches it
        return self._place

    def _share_memory(self, neighbour: Address | None) -> None:
        self._place = dataclasses.replace(self._place, reason=None)
        if self._spec.options.transport != "auto":
            return
        try:
            self._arena = parameter_arena(self._spec, neighbour)
        except (ArenaError, LaneError) as error:
            self._place = dataclasses.replace(self._place, reason=f"shard {self._spec.index}: {error}")

    def _make_host(self, spec: ShardSpec) -> ShardHost:
        buffers = None
        if self._arena is not None:
            first, second = (cut_flat(flat, spec.ranges) for flat in self._arena.flats)
            buffers = (first, second)
        how = {"threads": self._threads, "run": self._executor.submit, "on_notice": self._notice, "attach": self._attach}
        host = ShardHost(spec, buffers=buffers, **how)  # type: ignore[arg-type]
        if self._exporter is not None:
            host.count_in(self._exporter.meter)
        return host

    def _serve(self, host: ShardHost) -> None:
        if self._arena is None:
            self._place = dataclasses.replace(self._place, address=None)
            return
        lanes = LaneServer(self._spec, self._arena, host.deliver)
        host.find_slot = lanes.slot
        self._place = dataclasses.replace(self._place, address=lanes.address)

    def _notice(self, notice: Notice) -> None:
        self._supervisor.notice.remote(notice.what, notice.rank, notice.incarnation)

    def _attach(self, standby: Hired, standing: Standing, config: Any, arrays: dict[str, Flat]) -> Replica:
        """Copy the state to a standby; between processes of one node by memory, else by objects."""
        timeout_s = self._spec.options.shard_timeout_s
        if standby.place.node == self._place.node and standby.place.address is not None:
            replica: Replica = LaneReplica(standby.place.address, arrays, standing.round, timeout_s)
            try:
                ray.get(standby.handle.begin.remote(standing, config), timeout=timeout_s)
            except BaseException:
                replica.close()
                raise
            return replica
        return CallReplica(standby.handle, standing, config, arrays, timeout_s / 4)  # this shard's own silence is judged by all of it


class CallReplica(Replica):
    """A standby on another node: what it is given travels by Ray objects, and counts once it has answered.

    While the first copy is on its way, rounds go on without waiting for it.
    """

    def __init__(self, standby: Any, standing: Standing, config: Any, arrays: dict[str, Flat], timeout_s: float) -> None:
        self._standby, self._timeout_s = standby, timeout_s
        self._spaces = sorted(arrays["params"])
        self.mean = empty_flat({space: values.size for space, values in arrays["params"].items()})
        given = [arrays[name][space] for space in self._spaces for name in ("params", "m", "v")]
        self._calls = [standby.begin.remote(standing, config, *given)]
        self.reached, self._synced = standing.round, False

    def ready(self) -> bool:
        """See `Replica.ready`; a call has copied its arguments."""
        return True

    def send(self, record: Record) -> bool:
        """See `Replica.send`."""
        means = [self.mean[space] for space in self._spaces] if isinstance(record, Replicated) and record.outcome == "applied" else []
        self._calls.append(self._standby.replicate.remote(record, *means))
        try:
            if self._synced:
                ray.get(self._calls, timeout=self._timeout_s)
                self._calls = []
            else:
                done, self._calls = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
                ray.get(done)
                self._synced = not self._calls
        except Exception:  # whatever it is, that standby cannot follow
            return False
        if isinstance(record, Replicated):
            self.reached = record.round
        return True

    def close(self) -> None:
        """See `Replica.close`."""
        with contextlib.suppress(Exception):  # it is gone, or does not answer; the supervisor hears of that by itself
            ray.get(self._standby.replicate.remote(LetGo()), timeout=_LET_GO_S)
