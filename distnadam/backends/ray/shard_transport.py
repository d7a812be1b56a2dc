"""Messages to the shards of a Ray cluster, by the newest shard map that this process has."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from typing_extensions import override

from distnadam.backends.base import Pending, ShardTransport, WorkerChannel
from distnadam.backends.ray.address import ProcessAddress, Relayed
from distnadam.backends.ray.calls import (
    Callee,
    RayPending,
    make_call,
    retry_in_background,
    shard_callee,
    translate,
)
from distnadam.backends.ray.joined import while_ray_lives
from distnadam.backends.ray.processes import process_start_time, process_token
from distnadam.backends.ray.supervisor_client import RaySupervisorClient
from distnadam.backends.ray.worker_channel import ChannelOwner, RayWorkerChannel
from distnadam.config import Options
from distnadam.errors import ArenaError, LaneError, Reconfigured, StepTimeout
from distnadam.protocol.messages import Message, Resume
from distnadam.protocol.supervisor_messages import Order
from distnadam.supervision.shard_map import ShardMap, require_alive
from distnadam.tensors.layout import Layout, Ranges

_SERVE_S = 60.0


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
    def cuts(self) -> Sequence[Ranges]:
        return self.shard_map.cuts

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
            return RayPending(
                {index: make_call(call, shard_callee(index)) for index, call in calls.items()}
            )

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
            relayed=self._relayed,
            pull_dtypes=layout.pull_dtypes,
        )
        return RayWorkerChannel(self, owner, ranges, incarnation)

    def _relayed(self) -> dict[int, Relayed | LaneError]:
        """Have the relay of this node stand for the shards of others; return where.

        Raises:
            ArenaError, LaneError: there is none, or it has no memory.
        """
        node = ray.get_runtime_context().get_node_id()
        gone: ProcessAddress | None = None
        while True:
            try:
                relay = self._supervisor.relay(node, gone)
            except StepTimeout as error:
                raise LaneError(f"the relay of this node: {error}") from error
            if process_start_time(relay.address.pid) == relay.address.born:
                break
            gone = relay.address  # the supervisor does not know it yet
        try:
            found: dict[int, Relayed | LaneError] = ray.get(
                relay.handle.serve.remote(self.shard_map), timeout=_SERVE_S
            )
        except RayError as error:
            ours = translate(error, Callee(who="the relay of this node", died=LaneError))
            if isinstance(ours, ArenaError | LaneError):
                raise ours from error
            raise LaneError(f"the relay of this node: {str(ours).splitlines()[0]}") from error
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
