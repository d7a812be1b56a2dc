"""The shards in this process: messages are method calls, gradients are read where they lie,
parameters are shared. No Ray.
"""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any

from typing_extensions import override

from distnadam.backends.base import (
    Backend,
    Pending,
    ShardTransport,
    SupervisorClient,
    WorkerChannel,
    WorkerGroup,
)
from distnadam.backends.local_channel import LocalPending, LocalWorkerChannel
from distnadam.backends.local_worker_group import LocalWorkerGroup
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.config import Options
from distnadam.errors import StepTimeout, Unrecoverable
from distnadam.metrics.meter import Meter, shard_bytes
from distnadam.planning import room
from distnadam.protocol.messages import (
    Message,
    RoundResult,
    ShardSpec,
    Step,
)
from distnadam.protocol.supervisor_messages import Order, ShardControlState
from distnadam.runtime.alone_ahead import RoundsAlone
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.phases import Phase
from distnadam.shield import await_unlocked, raise_interrupt, shield
from distnadam.supervision.process_manager import ShardProcess, ShardProcesses
from distnadam.supervision.resharding import Resharding, reshard
from distnadam.tensors.arrays import Array, Flat, cut_flat, memory_for
from distnadam.tensors.layout import Layout, Ranges
from distnadam.threads import renew_after_fork
from distnadam.transport.available_memory import available_bytes
from distnadam.transport.parameter_memory import ParameterMemory

_LOOK_S = 0.001
"""Seconds between two looks whether a shard still reads what was lent to it."""
_SLICE_S = 0.1
"""Seconds between two looks for a Ctrl-C, in a wait for several shards."""


class _Unseen(AbstractContextManager[bool]):
    """`LocalTransport.unseen`; not a generator's, which costs a microsecond a step."""

    def __init__(self, opening: Lock, is_unseen: Callable[[], bool]) -> None:
        self._opening = opening
        self._is_unseen = is_unseen

    @override
    def __enter__(self) -> bool:
        self._opening.acquire()
        return self._is_unseen()

    @override
    def __exit__(self, *exc: object) -> None:
        self._opening.release()


class LocalTransport(ShardTransport):
    """The shards' hosts, called directly; nothing dies by itself."""

    def __init__(self) -> None:
        self.hosts: list[ShardHost] = []
        self.rounds: list[RoundsAlone] = []
        self.specs: list[ShardSpec] = []
        self._cuts: list[Ranges] = []
        self.memory = ParameterMemory({})
        self._version = 0
        self._has_channels = False
        self._is_shared = False
        self._written: tuple[tuple[Flat, Flat] | None, Sequence[Array]] = None, []
        self.after_fork()
        renew_after_fork(self)

    def make_host(self, spec: ShardSpec) -> ShardHost:
        """Return a new host, whose parameter buffers are views of `memory`."""
        first, second = (cut_flat(buffer, spec.ranges) for buffer in self.memory.written)
        with memory_for(f"shard {spec.index}: its state of {shard_bytes(spec)} bytes"):
            host = ShardHost(
                spec,
                buffers=(first, second),
                threads=spec.options.threads or len(os.sched_getaffinity(0)),
            )
        host.shard.state.in_place = self._is_shared
        return host

    def replace(self, specs: Sequence[ShardSpec], shards: Sequence[ShardProcess]) -> None:
        """Send every later message to these hosts; the parameters stay where they are."""
        self.specs = list(specs)
        self._cuts = [spec.ranges for spec in specs]
        self.hosts = [process.handle for process in shards]
        self.rounds = [RoundsAlone(host) for host in self.hosts]
        self._version += 1

    @property
    @override
    def cuts(self) -> Sequence[Ranges]:
        return self._cuts

    @property
    @override
    def version(self) -> int:
        return self._version

    @property
    @override
    def written_here(self) -> Sequence[Array]:
        read, arrays = self._written
        if read is not self.memory.read:
            read = self.memory.read
            arrays = [values for flat in read or () for values in flat.values()]
            self._written = read, arrays
        return arrays

    def after_fork(self) -> None:
        """Wait for no thread that only the parent has."""
        self._opening = Lock()
        self._unseen = _Unseen(self._opening, lambda: not self._has_channels)

    @override
    def unseen(self) -> AbstractContextManager[bool]:
        return self._unseen

    @override
    def share_parameters(self) -> Sequence[Array]:
        states = [host.shard.state for host in self.hosts]
        with self._opening:  # so that nobody steps meanwhile
            for rounds in self.rounds:
                rounds.stop()
            if self._has_channels or self.memory.read is None or any(s.masters for s in states):
                return []
            self.memory.share(states[0].active)
            self._is_shared = True
            for state in states:
                state.in_place = True
        return self.written_here

    @override
    def move_parameters(self) -> None:
        for host, rounds in zip(self.hosts, self.rounds, strict=True):
            rounds.stop()
            with host.lock:
                host.shard.state.move()

    @property
    def _writes_in_place(self) -> bool:
        """Whether a step goes on that its caller has given up, where a view would see it."""
        return any(
            host.shard.phase is Phase.STEPPING and host.shard.rounds.current.in_place
            for host in self.hosts
        )

    @override
    def await_work(self) -> None:
        deadline = time.monotonic() + self.specs[0].options.step_timeout_s
        while any(host.shard.phase in (Phase.MEASURING, Phase.STEPPING) for host in self.hosts):
            raise_interrupt()
            if time.monotonic() > deadline:
                return
            time.sleep(_LOOK_S)

    @override
    def step_at_once(self, step: Step) -> RoundResult | None:
        memory, token = self.memory, object()
        if memory.read is None or len(self.hosts) > 1:
            return None
        try:
            memory.inside.add(token)
            if memory.forks != memory.settled:
                memory.settle(token)
            return self.rounds[0].step_at_once(step)
        finally:
            memory.inside.discard(token)

    @override
    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        return LocalPending(self, messages)

    @override
    def open_channel(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        timeout_s = self.specs[0].options.step_timeout_s
        if not await_unlocked(lambda: self._opening.locked() or self._writes_in_place, timeout_s):
            raise StepTimeout(f"worker {rank}: apply_gradients was not done in {timeout_s:g} s")
        with self._opening:
            self._has_channels = True  # and for ever: its worker may keep views
        return LocalWorkerChannel(self, layout)

    @override
    def refresh(self) -> None:
        """Do nothing: `hosts` is always the present ones."""

    @override
    def await_recovery(self, timeout_s: float) -> None:
        raise Unrecoverable("the shards of this process cannot be replaced")

    @override
    def wait_if_moved(self, version: int) -> bool:
        return self._version > version

    @override
    def require_open(self) -> None:
        """Do nothing: the answer to a post says whether its host was closed."""

    @override
    def new_token(self) -> str:
        return secrets.token_hex(8)


class LocalSupervisorClient(SupervisorClient):
    """Reshards the shards of this process; with no recovery there is nothing else to keep."""

    def __init__(self, transport: LocalTransport) -> None:
        self._transport = transport
        self._events = 0

    @override
    def started(self, *, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        """Do nothing: shards of this process never go back."""

    @override
    def report_cannot_complete(self) -> None:
        """Do nothing: the caller's error ends the run."""

    @override
    def replacement_begun(self, what: str) -> int:
        return self.snapshot_taken()

    @override
    def replacement_completed(self, begun: int) -> None:
        """Do nothing: shards of this process never go back."""

    @override
    def snapshot_taken(self) -> int:
        self._events += 1
        return self._events

    @override
    def checkpoint_written(self, checkpoint: CheckpointId, taken: int, *, is_whole: bool) -> None:
        """Do nothing: shards of this process never go back."""

    @override
    def lost_ranks(self) -> dict[int, int]:
        return {}

    @override
    def shard_recoveries(self) -> int:
        return 0

    @override
    def reshard(self, cuts: Sequence[Ranges]) -> None:
        transport = self._transport
        hosts, specs = transport.hosts, transport.specs
        what = Resharding(
            token=transport.new_token(),
            specs=specs,
            shards=[ShardProcess(index, host, None) for index, host in enumerate(hosts)],
            cuts=cuts,
            epoch=0,
            newest={},
            pause_s=specs[0].options.step_timeout_s,
        )
        # beside the present state, of which each array lives on until all have moved
        _check_memory(dataclasses.replace(room.state(specs), what="a second copy of the state"))
        reshard(LocalProcesses(transport), what, transport.replace)


class LocalProcesses(ShardProcesses):
    """Hosts in this process, in the place of processes, as a reshard needs them."""

    def __init__(self, transport: LocalTransport) -> None:
        self._transport = transport

    @override
    def start(
        self,
        spec: ShardSpec,
        *,
        standby: bool,
        near: Sequence[ShardProcess],
        beside: ShardProcess | None = None,
    ) -> ShardProcess:
        return ShardProcess(spec.index, self._transport.make_host(spec), None)

    @override
    def terminate(self, *processes: ShardProcess) -> None:
        for process in processes:
            process.handle.close()

    @override
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        memory, token = self._transport.memory, object()
        try:
            memory.inside.add(token)
            if memory.forks != memory.settled:
                memory.settle(token)
            futures = {
                index: targets[index].handle.send(message)
                for index, message in messages.items()
                if index in targets
            }
        finally:
            memory.inside.discard(token)
        deadline = time.monotonic() + timeout_s
        while wait(futures.values(), timeout=_SLICE_S).not_done and time.monotonic() < deadline:
            raise_interrupt()
        return {
            index: (future.exception() or future.result())
            if future.done()
            else StepTimeout(f"shard {index} did not answer in {timeout_s:g} s")
            for index, future in futures.items()
        }

    @override
    def control_state(self, process: ShardProcess) -> ShardControlState:
        state: ShardControlState = process.handle.control_state
        return state


class LocalBackend(Backend):
    """Hosts in this process.

    The last worker to push a round steps the shard in its own thread, with more threads to help.
    """

    name = "local"
    transport: LocalTransport
    supervisor: LocalSupervisorClient
    shield = shield

    def __init__(self) -> None:
        self.transport = LocalTransport()
        self.supervisor = LocalSupervisorClient(self.transport)

    @property
    @override
    def meter(self) -> Meter | None:
        return None

    @override
    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """Make the hosts; standbys in this process would die with it, so there are none."""
        layout = specs[0].layout
        _check_memory(room.buffers(layout), room.state(specs))
        with memory_for("two buffers of the model's parameters"):
            self.transport.memory = ParameterMemory(layout.sizes, layout.pull_dtypes)
        hosts = [self.transport.make_host(spec) for spec in specs]
        self.transport.replace(specs, [ShardProcess(i, host, None) for i, host in enumerate(hosts)])

    @override
    def hosts(self) -> list[str]:
        return ["this process"] * len(self.transport.cuts)

    @override
    def standbys(self) -> dict[int, str]:
        return {}

    @override
    def worker_group(
        self, size: int, make: Callable[..., Any], options: Options, given: tuple[Any, ...] = ()
    ) -> WorkerGroup:
        return LocalWorkerGroup(size, make, given, threads=max(1, int(options.worker_cpus)))

    @override
    def close(self, *, destroy: bool) -> None:
        if destroy:
            for host in self.transport.hosts:
                host.close()


def _check_memory(*needs: room.Need) -> None:
    room.check("this process", available_bytes(), needs)
