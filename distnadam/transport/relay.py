"""The relay of one host: it stands for the shards of other hosts, so that workers have one way to
all shards, and parameters cross the host's cable once. No Ray.

It keeps nothing that messages cannot rebuild. Its memory and its connections begin and end with it:
another relay of the host has new ones.
"""

import os
import time
from collections.abc import Collection

from distnadam.protocol.messages import ShardSpec
from distnadam.transport.far_shard import FarShard, Reach
from distnadam.transport.shared_memory import Arena
from distnadam.transport.unix_connection import Address, connect


class Relay:
    """The shards of other hosts, by index, as the workers of this one reach them.

    Args:
        number: of this host: it sends to the shard of the next number first.
        arena: the host's two parameter buffers: a near shard's, or new ones.
    """

    def __init__(self, number: int, arena: Arena) -> None:
        self.arena = arena
        self._number = number
        self._shards: dict[int, FarShard] = {}

    def serve(self, spec: ShardSpec, reach: Reach) -> None:
        """Stand for a shard from now on, in place of an earlier one of its index.

        Raises:
            LaneError: the system has no socket or thread for its workers.
        """
        self.drop(spec.index)
        self._shards[spec.index] = FarShard(spec, self.arena, reach, self._number)

    def drop(self, index: int) -> None:
        """Hang up on the workers of a shard, if there are any, and on the shard."""
        if (shard := self._shards.pop(index, None)) is not None:
            shard.close()

    def await_connections(self, indices: Collection[int], timeout_s: float) -> None:
        """Wait until the first try to connect to each of these shards has ended."""
        deadline = time.monotonic() + timeout_s
        for index in indices:
            self._shards[index].tried.wait(max(0.0, deadline - time.monotonic()))

    def __contains__(self, index: int) -> bool:
        return index in self._shards

    def address(self, index: int) -> Address:
        """Where workers reach a shard."""
        return self._shards[index].address

    def is_by_tcp(self, index: int) -> bool:
        """Whether the connection to a shard is open."""
        return self._shards[index].is_by_tcp

    @property
    def num_connections(self) -> int:
        """How many connections of workers there are."""
        return sum(shard.workers.num_workers for shard in list(self._shards.values()))

    def close(self) -> None:
        """Hang up on everyone."""
        for index in list(self._shards):
            self.drop(index)


def is_arena_of(arena: Arena, neighbour: Address) -> bool:
    """Whether a shard of this host has its parameters in this memory.

    Raises:
        LaneError: it cannot be reached.
    """
    connection, _, fds = connect(neighbour, {"rank": None}, [])
    connection.close()
    try:
        return any(os.path.samestat(os.fstat(arena.fd), os.fstat(fd)) for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)
