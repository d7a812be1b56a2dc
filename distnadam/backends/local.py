"""The shards in this process: messages are method calls, gradients are read where they lie,
parameters are shared. No Ray.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from distnadam.backends.base import Backend, Pending, WorkerChannel, WorkerGroup
from distnadam.checkpoint.shard_file import ARRAYS
from distnadam.config import Options
from distnadam.errors import Reconfigured
from distnadam.metrics.meter import state_bytes
from distnadam.protocol.messages import CatchUp, Message, Pause, Push, Read, ShardSpec, TotalNorms
from distnadam.protocol.supervisor_messages import Order, Reconfigure, Retire
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.arrays import Flat, cut_flat, empty_flat, memory_for, zeros_flat
from distnadam.tensors.layout import Layout, Ranges


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


class LocalWorkerChannel(WorkerChannel):
    """This process's memory: the shards read gradients where the worker wrote them, the worker
    reads the shards' parameters.
    """

    def __init__(self, backend: "LocalBackend", layout: Layout) -> None:
        self._backend = backend
        self.gradients, self.parameters = empty_flat(layout.sizes), backend.parameters

    def post(self, messages: Mapping[int, Push] | Mapping[int, TotalNorms]) -> Pending:
        """See `WorkerChannel.post`."""
        return self._backend.post(messages)

    def close(self) -> None:
        """See `WorkerChannel.close`."""


class LocalWorkerGroup(WorkerGroup):
    """Threads of this process; a member that is replaced goes on until its own call returns."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self._make, self._members = make, {rank: make(rank) for rank in range(size)}
        self._pool = ThreadPoolExecutor(size, "worker")
        self._calls: dict[Future[Any], int] = {}

    def call(self, rank: int, method: str, *args: Any) -> None:
        """See `WorkerGroup.call`."""
        self._calls[self._pool.submit(getattr(self._members[rank], method), *args)] = rank

    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        """See `WorkerGroup.results`."""
        done, _ = wait(self._calls, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return [(self._calls.pop(future), future.exception() or future.result()) for future in done]

    def replace(self, rank: int) -> None:
        """See `WorkerGroup.replace`."""
        self._calls = {future: r for future, r in self._calls.items() if r != rank}
        self._members[rank] = self._make(rank)

    def close(self) -> None:
        """See `WorkerGroup.close`."""
        self._pool.shutdown()


class LocalBackend(Backend):
    """Hosts in this process; the last worker to push a round steps the shard in its own thread,
    with more threads to help.
    """

    name = "local"

    def __init__(self) -> None:
        self._hosts: list[ShardHost] = []
        self._specs: list[ShardSpec] = []
        self.parameters: tuple[Flat, Flat] = ({}, {})

    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """See `Backend.start`; standbys in the same process would die with it, so there are
        none.
        """
        sizes = specs[0].layout.sizes
        with memory_for("two buffers of the model's parameters"):
            self.parameters = (zeros_flat(sizes), zeros_flat(sizes))
        self._specs = list(specs)
        self._hosts = [self._make(spec) for spec in specs]

    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        """See `Backend.post`."""
        hosts = self._hosts
        if any(index >= len(hosts) for index in messages):
            raise Reconfigured(f"there are {len(hosts)} shards now; look again")
        return LocalPending(
            {index: hosts[index].send(message) for index, message in messages.items()}
        )

    @property
    def num_shards(self) -> int:
        """See `Backend.num_shards`."""
        return len(self._hosts)

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """See `Backend.reshard`; the parameters stay where they are."""
        old, token = self._hosts, "reshard"
        held = [host.send(Pause(token)).result() for host in old]
        newest = max(answer.round for answer in held)
        for host, answer in zip(old, held, strict=True):
            if answer.round < newest:
                host.send(CatchUp(token, newest)).result()
        control_state, epoch = old[0].control_state, max(answer.epoch for answer in held) + 1
        arrays = [host.send(Read(token, ARRAYS)).result() for host in old]
        whole = {name: empty_flat(self._specs[0].layout.sizes) for name in ARRAYS}
        for spec, parts in zip(self._specs, arrays, strict=True):
            for name, flat in parts.items():
                for space, (begin, end) in spec.ranges.items():
                    whole[name][space][begin:end] = flat[space]
        self._specs = [
            replace(self._specs[0], index=i, num_shards=num_shards, ranges=ranges)
            for i, ranges in enumerate(cuts)
        ]
        self._hosts = [self._make(spec) for spec in self._specs]
        for spec, host in zip(self._specs, self._hosts, strict=True):
            cut = {name: cut_flat(flat, spec.ranges) for name, flat in whole.items()}
            host.take_over(
                control_state, cut, Reconfigure(epoch=epoch, schedule=control_state.schedule)
            )
        for host in old:
            host.send(Retire(epoch)).result()
            host.close()

    def _make(self, spec: ShardSpec) -> ShardHost:
        first, second = (cut_flat(buffer, spec.ranges) for buffer in self.parameters)
        with memory_for(f"shard {spec.index}: its state of {state_bytes(spec.ranges)} bytes"):
            return ShardHost(
                spec,
                buffers=(first, second),
                threads=spec.options.threads or len(os.sched_getaffinity(0)),
            )

    def link(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        """See `Backend.link`."""
        return LocalWorkerChannel(self, layout)

    def team(self, size: int, make: Callable[[int], Any], options: Options) -> WorkerGroup:
        """See `Backend.team`; threads ask for nothing."""
        return LocalWorkerGroup(size, make)

    def close(self, *, destroy: bool) -> None:
        """See `Backend.close`."""
        if destroy:
            for host in self._hosts:
                host.close()
