"""The relay of one Ray node as an actor. The bytes' ways are decided in `transport`, not here."""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from distnadam.backends.ray import registry
from distnadam.backends.ray.address import ProcessAddress, Relayed
from distnadam.backends.ray.calls import gather_with_retry, shard_callee, translate
from distnadam.errors import LaneError
from distnadam.protocol.delivery import Reply
from distnadam.protocol.messages import Describe, Message, ShardSpec
from distnadam.protocol.supervisor_messages import Order
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.shard_map import ShardMap
from distnadam.transport.far_shard import Reach
from distnadam.transport.relay import Relay, is_arena_of
from distnadam.transport.shm_server import parameter_arena
from distnadam.transport.tcp_connection import Endpoint

_LISTEN_S = 15.0


class RelayActor:
    """The relay of the node that it is placed on.

    Args:
        run: begins the names of the optimizer's processes.
    """

    def __init__(self, run: str) -> None:
        self._address = registry.register(run)
        self._relay: Relay | None = None
        self._known: dict[int, tuple[ShardProcess, ShardSpec]] = {}
        self._version = 0
        self._serving = asyncio.Lock()
        self._last_used = time.monotonic()

    async def address(self) -> ProcessAddress:
        """Return this process."""
        return self._address

    async def beat(self) -> float:
        """Return for how many seconds no worker has been connected."""
        if self._serving.locked() or (self._relay is not None and self._relay.num_connections):
            self._last_used = time.monotonic()
        return time.monotonic() - self._last_used

    async def serve(self, shard_map: ShardMap) -> dict[int, Relayed | LaneError]:
        """Stand for the shards of other nodes.

        Returns:
            By index, where they are reached from now on, or why one is not. One that is another
            process by the newest map known here than by the one given is left out.

        Raises:
            ArenaError: the memory is not available.
            LaneError: a neighbour's memory cannot be shared.
        """
        async with self._serving:
            self._last_used = time.monotonic()
            return await asyncio.to_thread(self._serve, shard_map)

    def _serve(self, shard_map: ShardMap) -> dict[int, Relayed | LaneError]:
        found: dict[int, Relayed | LaneError] = {}
        if shard_map.version >= self._version:
            self._version = shard_map.version
            found |= self._adopt(shard_map)
        for index, process in enumerate(shard_map.shards):
            relay = self._relay
            if relay is not None and index in relay and self._known[index][0] == process:
                found[index] = Relayed(socket=relay.address(index), by_tcp=relay.is_by_tcp(index))
        return found

    def _adopt(self, shard_map: ShardMap) -> dict[int, LaneError]:
        """Serve the shards of a map; return which of them cannot be, and why."""
        node = self._address.node
        near = [each for each in shard_map.shards if each.address.node == node]
        far = {i: each for i, each in enumerate(shard_map.shards) if each.address.node != node}
        for index in [i for i, (each, _) in self._known.items() if far.get(i) != each]:
            del self._known[index]
            if self._relay is not None:
                self._relay.drop(index)
        failed = self._get_to_know({i: far[i] for i in far if i not in self._known})
        if not self._known:
            return failed
        relay = self._relay_beside(near)
        for index, (process, spec) in self._known.items():
            if index not in relay:
                find, carry = partial(_find, index, process), partial(_carry, index, process)
                relay.serve(spec, Reach(find=find, carry=carry))
        relay.await_connections(self._known, _LISTEN_S)
        return failed

    def _get_to_know(self, shards: Mapping[int, ShardProcess]) -> dict[int, LaneError]:
        """Ask shards for their specs; return which of them do not say, and why."""
        calls = {i: partial(p.handle.send.remote, Describe(spec=True)) for i, p in shards.items()}
        answers = gather_with_retry(calls, _LISTEN_S)
        failed = {i: answer for i, answer in answers.items() if isinstance(answer, Exception)}
        self._known |= {i: (p, answers[i].spec) for i, p in shards.items() if i not in failed}
        return {i: LaneError(f"shard {i}: {why}") for i, why in failed.items()}

    def _relay_beside(self, near: list[ShardProcess]) -> Relay:
        """Return the relay; a new one where this node's shards have their parameters elsewhere."""
        sockets = (each.address.socket for each in near)
        neighbour = next((socket for socket in sockets if socket is not None), None)
        if self._relay is not None:
            try:
                if neighbour is None or is_arena_of(self._relay.arena, neighbour):
                    return self._relay
            except LaneError:  # it has died: its successor will be looked at
                return self._relay
            self._relay.close()
            self._relay = None
        _, spec = next(iter(self._known.values()))
        number = min((each.index for each in near), default=spec.num_shards)
        self._relay = Relay(number, parameter_arena(spec, neighbour))
        return self._relay


def _find(index: int, process: ShardProcess) -> Endpoint:
    """Have a shard listen; return where."""
    try:
        endpoint: Endpoint = ray.get(process.handle.listen.remote(), timeout=_LISTEN_S)
    except RayError as error:
        ours = translate(error, shard_callee(index))
        raise LaneError(str(ours).splitlines()[0]) from error
    return endpoint


def _carry(index: int, process: ShardProcess, message: Message | Order, reply: Reply) -> None:
    """Send a message as a Ray call, its arrays as Ray objects."""

    def done(future: Any) -> None:
        error = future.exception()
        reply(future.result() if error is None else translate(error, shard_callee(index)))

    process.handle.send.remote(message).future().add_done_callback(done)
