"""How a primary reaches its standby: over shared memory on one node, by TCP between nodes, by Ray's
calls where that cannot be had.
"""

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from distnadam.backends.ray.calls import Callee, translate
from distnadam.backends.ray.object_replication import ObjectReplicationStream
from distnadam.errors import LaneError
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import ShardControlState
from distnadam.shard.state import ShardState
from distnadam.supervision.process_manager import ShardProcess
from distnadam.tensors.arrays import Flat
from distnadam.transport.far_shard import REMEDY
from distnadam.transport.replication import ReplicationStream
from distnadam.transport.shared_memory import Arena
from distnadam.transport.shm_replication import ShmReplicationStream
from distnadam.transport.state_memory import copies_in, reserve_state
from distnadam.transport.tcp_connection import Endpoint
from distnadam.transport.tcp_replication import TcpReplicationStream

log = logging.getLogger("distnadam")


class StandbyConnector:
    """Copies a primary's state to its standby, and returns the stream for what follows.

    Args:
        spec: the shard's spec.
        endpoint_of: has a standby listen and returns where; a LaneError if it cannot.
    """

    def __init__(
        self, spec: ShardSpec, endpoint_of: Callable[[ShardProcess, float], Endpoint] | None = None
    ) -> None:
        self._spec = spec
        self._endpoint_of = endpoint_of or _endpoint_of
        self._timeout_s = spec.options.shard_timeout_s
        self._has_warned = False
        self._memory: Arena | None = None  # that the state is kept in twice

    def connect(
        self,
        node: str,
        parameters: Arena | None,
        standby: ShardProcess,
        control_state: ShardControlState,
        config: Any,
        state: ShardState,
    ) -> ReplicationStream:
        """Fill a standby; `node` is the primary's, and `parameters` the arena of its buffers.

        Raises:
            LaneError: it cannot be reached over shared memory.
            ArenaError: there is not enough of it.
            RayError, DistNadamError: it is dead, or does not answer.
        """
        stream: ReplicationStream | None
        socket = standby.address.socket
        if standby.address.node == node and socket is not None and parameters is not None:
            memory, decided = self._keep_twice(state), control_state.round
            stream = ShmReplicationStream(socket, memory, parameters, decided, self._timeout_s)
        else:
            arrays = state.arrays()
            # a quarter: after `timeout_s` this shard itself would count as silent
            patience_s = self._timeout_s / 4
            stream = self.by_tcp(standby, arrays, control_state.round, patience_s)
            if stream is None:
                return ObjectReplicationStream(
                    standby.handle, control_state, config, arrays, patience_s
                )
        try:
            ray.get(standby.handle.begin.remote(control_state, config), timeout=self._timeout_s)
        except BaseException:
            stream.close()
            raise
        return stream

    def _keep_twice(self, state: ShardState) -> Arena:
        """Have the state kept twice, in memory that this process can give away, and return that."""
        if self._memory is None:
            memory = reserve_state(self._spec)
            state.keep_twice(copies_in(memory, self._spec))
            self._memory = memory
        return self._memory

    def by_tcp(
        self, standby: ShardProcess, arrays: dict[str, Flat], decided: int, patience_s: float
    ) -> ReplicationStream | None:
        """Return a stream by TCP; None, with one warning, where it cannot be had."""
        if self._spec.options.transport != "auto":
            return None
        index = self._spec.index
        try:
            endpoint = self._endpoint_of(standby, self._timeout_s)
            stream = TcpReplicationStream(index, endpoint, arrays, decided, patience_s)
        except LaneError as error:
            level = logging.INFO if self._has_warned else logging.WARNING
            log.log(level, "%s; %s", error, REMEDY)
            self._has_warned = True
            return None
        log.info(
            "shard %d: its standby follows by TCP, at %s port %d",
            index,
            endpoint.host,
            endpoint.port,
        )
        return stream


def _endpoint_of(standby: ShardProcess, timeout_s: float) -> Endpoint:
    try:
        endpoint: Endpoint = ray.get(standby.handle.follow.remote(), timeout=timeout_s)
    except RayError as error:
        callee = Callee(who=f"the standby of shard {standby.index}")
        raise translate(error, callee) from error
    return endpoint
