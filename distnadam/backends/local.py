"""The shards in this process: messages are method calls, gradients are read where they lie, parameters are shared. No Ray."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from distnadam.arrays import Flat, cut_flat, empty_flat, zeros_flat
from distnadam.backends.base import Backend, Link, Pending, Team
from distnadam.backends.host import ShardHost
from distnadam.layout import Layout, Ranges
from distnadam.messages import Message, Norms, Push, ShardSpec
from distnadam.orders import Order


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
    """Threads of this process; a member that is replaced goes on until its own call returns."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self._make, self._members = make, {rank: make(rank) for rank in range(size)}
        self._pool = ThreadPoolExecutor(size, "worker")
        self._calls: dict[Future[Any], int] = {}

    def call(self, rank: int, method: str, *args: Any) -> None:
        """See `Team.call`."""
        self._calls[self._pool.submit(getattr(self._members[rank], method), *args)] = rank

    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        """See `Team.results`."""
        done, _ = wait(self._calls, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return [(self._calls.pop(future), future.exception() or future.result()) for future in done]

    def replace(self, rank: int) -> None:
        """See `Team.replace`."""
        self._calls = {future: r for future, r in self._calls.items() if r != rank}
        self._members[rank] = self._make(rank)

    def close(self) -> None:
        """See `Team.close`."""
        self._pool.shutdown()


class LocalBackend(Backend):
    """Hosts in this process; the last worker to push a round steps the shard in its own thread, with more threads to help."""

    name = "local"

    def __init__(self) -> None:
        self._hosts: list[ShardHost] = []
        self.parameters: tuple[Flat, Flat] = ({}, {})

    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """See `Backend.start`; standbys in the same process would die with it, so there are none."""
        sizes, options = specs[0].layout.sizes, specs[0].options
        self.parameters = (zeros_flat(sizes), zeros_flat(sizes))
        threads = options.threads or len(os.sched_getaffinity(0))
        for spec in specs:
            first, second = (cut_flat(buffer, spec.ranges) for buffer in self.parameters)
            self._hosts.append(ShardHost(spec, buffers=(first, second), threads=threads))

    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        """See `Backend.post`."""
        return LocalPending({index: self._hosts[index].send(message) for index, message in messages.items()})

    def link(self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int) -> Link:
        """See `Backend.link`."""
        return LocalLink(self, layout)

    def team(self, size: int, make: Callable[[int], Any], *, cpus: float) -> Team:
        """See `Backend.team`; threads ask for nothing."""
        return LocalTeam(size, make)

    def close(self, *, destroy: bool) -> None:
        """See `Backend.close`."""
        if destroy:
            for host in self._hosts:
                host.close()
