"""The shards in this process: messages are method calls, gradients are read where they lie, parameters are shared. No Ray."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from distnadam.arrays import Flat, zeros_flat
from distnadam.backends.base import Backend, Pending, Team
from distnadam.backends.host import ShardHost
from distnadam.messages import Message, ShardSpec


class LocalPending(Pending):
    """Futures of this process."""

    def __init__(self, futures: dict[int, Future[Any]]) -> None:
        self._futures = futures

    def result(self, timeout_s: float) -> dict[int, Any]:
        """See `Pending.result`."""
        done, late = wait(self._futures.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
        for future in self._futures.values():
            if future in done and (error := future.exception()) is not None:
                raise error
        if late:
            raise TimeoutError
        return {index: future.result() for index, future in self._futures.items()}


class LocalTeam(Team):
    """Threads of this process."""

    def __init__(self, members: Sequence[Any]) -> None:
        self._members = members
        self._pool = ThreadPoolExecutor(len(members), "worker")

    def call(self, method: str, *args: Any) -> Pending:
        """See `Team.call`."""
        return LocalPending({rank: self._pool.submit(getattr(member, method), *args) for rank, member in enumerate(self._members)})

    def close(self) -> None:
        """See `Team.close`."""
        self._pool.shutdown()


class LocalBackend(Backend):
    """Hosts in this process; the last worker to push a round steps the shard in its own thread, with more threads to help."""

    name = "local"

    def __init__(self) -> None:
        self._hosts: list[ShardHost] = []

    def start(self, specs: Sequence[ShardSpec]) -> None:
        """See `Backend.start`."""
        sizes, options = specs[0].layout.sizes, specs[0].options
        self.parameters = (zeros_flat(sizes), zeros_flat(sizes))
        threads = options.threads or len(os.sched_getaffinity(0))
        for spec in specs:
            first, second = (_cut(buffer, spec) for buffer in self.parameters)
            self._hosts.append(ShardHost(spec, buffers=(first, second), threads=threads))

    def post(self, messages: Mapping[int, Message]) -> Pending:
        """See `Backend.post`."""
        return LocalPending({index: self._hosts[index].send(message) for index, message in messages.items()})

    def team(self, size: int, make: Callable[[int], Any], *, cpus: float) -> Team:
        """See `Backend.team`; threads ask for nothing."""
        return LocalTeam([make(rank) for rank in range(size)])

    def close(self, *, destroy: bool) -> None:
        """See `Backend.close`."""
        if destroy:
            for host in self._hosts:
                host.close()


def _cut(flat: Flat, spec: ShardSpec) -> Flat:
    return {space: flat[space][begin:end] for space, (begin, end) in spec.ranges.items()}
