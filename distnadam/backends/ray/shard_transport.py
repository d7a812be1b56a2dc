"""Messages to the shards of a Ray cluster, by the newest shard map that this process has."""

import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from typing_extensions import override

from distnadam.backends.base import Pending, ShardTransport, WorkerChannel
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.calls import (
    RayPending,
    retry_in_background,
    shard_callee,
    translate,
)
from distnadam.backends.ray.joined import while_ray_lives
from distnadam.backends.ray.processes import process_token
from distnadam.backends.ray.supervisor_client import RaySupervisorClient
from distnadam.backends.ray.worker_channel import ChannelOwner, RayWorkerChannel
from distnadam.config import Options
from distnadam.errors import LaneError, Reconfigured
from distnadam.protocol.messages import Message, Resume
from distnadam.protocol.supervisor_messages import Order
from distnadam.supervision.shard_map import ShardMap, require_alive
from distnadam.tensors.layout import Layout, Ranges
from distnadam.transport.tcp_connection import Endpoint

_LISTEN_S = 15.0


class RayShardTransport(ShardTransport):
    """The shards' actors.

    Args:
        supervisor: says where the shards are.
        shard_map: where they are now.
        options: the optimizer's.
    """

    def __init__(
        self, supervisor: RaySupervisorClient, shard_map: ShardMap, options: Options
    ) -> None:
        self._supervisor = supervisor
        self.shard_map = shard_map
        self._options = options

    @property
    def actors(self) -> list[Any]:
        """The shards' actors, in order."""
        return [process.handle for process in self.shard_map.shards]

    @property
    def addresses(self) -> list[ProcessAddress]:
        """Where the shards are, in order."""
        return [process.address for process in self.shard_map.shards]

    @property
    @override
    def num_shards(self) -> int:
        return len(self.shard_map.shards)

    @property
    @override
    def version(self) -> int:
        return self.shard_map.version

    @override
    def require_open(self) -> None:
        self._supervisor.require_open()

    @override
    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        self.require_open()
        shards = self.shard_map.shards
        if any(index >= len(shards) for index in messages):
            raise Reconfigured(f"there are {len(shards)} shards now; look again")
        calls = {
            index: partial(shards[index].handle.send.remote, message)
            for index, message in messages.items()
        }
        with while_ray_lives():
            if messages and all(isinstance(message, Resume) for message in messages.values()):
                for call in calls.values():  # one that is lost would hold the shard until a timeout
                    retry_in_background(call)
                return RayPending({})
            return RayPending({index: call() for index, call in calls.items()})

    @override
    def open_channel(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        self.require_open()
        shared = self._options.transport == "auto"
        owner = ChannelOwner(
            node=ray.get_runtime_context().get_node_id(),
            rank=rank,
            sizes=layout.sizes,
            addresses=lambda: self.addresses if shared else [],
            endpoints=self._endpoints,
            pull_dtypes=layout.pull_dtypes,
        )
        return RayWorkerChannel(self, owner, ranges, incarnation)

    def _endpoints(self, shards: Collection[int]) -> dict[int, Endpoint | LaneError]:
        """Have shards listen for workers of other nodes; return where, or why not."""
        found: dict[int, Endpoint | LaneError] = {}
        calls = {shard: self.shard_map.shards[shard].handle.listen.remote() for shard in shards}
        deadline = time.monotonic() + _LISTEN_S
        for shard, call in calls.items():
            try:
                left = max(0.0, deadline - time.monotonic())
                found[shard] = ray.get(call, timeout=left)
            except RayError as error:
                ours = translate(error, shard_callee(shard))
                found[shard] = LaneError(str(ours).splitlines()[0])
        return found

    @override
    def refresh(self) -> None:
        self.shard_map = require_alive(self._supervisor.shard_map())

    @override
    def await_recovery(self, timeout_s: float) -> None:
        self.shard_map = require_alive(
            self._supervisor.recovered_shard_map(self.shard_map.version, timeout_s=timeout_s)
        )

    @override
    def wait_if_moved(self, version: int) -> bool:
        self.await_recovery(self._options.step_timeout_s)
        return self.shard_map.version > version

    @override
    def new_token(self) -> str:
        self.require_open()
        return process_token()
