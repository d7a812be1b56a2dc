"""The shards in this process: messages are method calls, gradients are read where they lie, parameters are shared. No Ray."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from distnadam.arrays import Flat, cut_flat, empty_flat, zeros_flat
from distnadam.backends.base import Backend, Link, Pending, Team
from distnadam.backends.host import ShardHost
from distnadam.layout import Layout, Ranges
from distnadam.messages import Message, Norms, Push, ShardSpec


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


class LocalLink(Link):
    """This process's memory: the shards read gradients where the worker wrote them, the worker reads the shards' parameters."""

    def __init__(self, backend: "LocalBackend", layout: Layout) -> None:
        self._backend = backend
        self.gradients, self.parameters = empty_flat(layout.sizes), backend.parameters

    def post(self, messages: Mapping[int, Push] | Mapping[int, Norms]) -> Pending:
        """See `Link.post`."""
        return self._backend.post(messages)

    def close(self) -> None:
        """See `Link.close`."""


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
        self.parameters: tuple[Flat, Flat] = ({}, {})

    def start(self, specs: Sequence[ShardSpec]) -> None:
        """See `Backend.start`."""
        sizes, options = specs[0].layout.sizes, specs[0].options
        self.parameters = (zeros_flat(sizes), zeros_flat(sizes))
        threads = options.threads or len(os.sched_getaffinity(0))
        for spec in specs:
            first, second = (cut_flat(buffer, spec.ranges) for buffer in self.parameters)
            self._hosts.append(ShardHost(spec, buffers=(first, second), threads=threads))

    def post(self, messages: Mapping[int, Message]) -> Pending:
        """See `Backend.post`."""
        return LocalPending({index: self._hosts[index].send(message) for index, message in messages.items()})

    def link(self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int) -> Link:
        """See `Backend.link`."""
        return LocalLink(self, layout)

    def team(self, size: int, make: Callable[[int], Any], *, cpus: float) -> Team:
        """See `Backend.team`; threads ask for nothing."""
        return LocalTeam([make(rank) for rank in range(size)])

    def close(self, *, destroy: bool) -> None:
        """See `Backend.close`."""
        if destroy:
            for host in self._hosts:
                host.close()
