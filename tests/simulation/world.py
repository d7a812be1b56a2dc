"""A simulated cluster in one thread: processes that die on command, a supervisor driven by hand, a
transport that loses and delays messages.

Everything but the processes and the transport between them is the real thing. A caller that waits
has the shards do the work that is due; nothing sleeps, and what is not there at once is a
TimeoutError.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from typing_extensions import override

from distnadam.errors import GroupChanged, ShardLost, StepTimeout
from distnadam.protocol.messages import GroupPush, Push, ShardSpec, WorkerDied
from distnadam.protocol.supervisor_events import StandbyLost
from distnadam.protocol.supervisor_messages import (
    AbandonRank,
    AttachStandby,
    DescribeStandby,
    Reconfigure,
    Record,
    ReplicatedRound,
    ShardControlState,
)
from distnadam.runtime.shard_host import ShardHost
from distnadam.runtime.standby import Standby
from distnadam.shard.effects import Notice
from distnadam.shard.state import ShardState
from distnadam.supervision.events import LookNow, ProcessDied
from distnadam.supervision.process_manager import ProcessManager, ShardProcess
from distnadam.supervision.restore_points import RestoreMemory
from distnadam.supervision.supervisor import Supervisor
from distnadam.tensors.arrays import Flat, cut_flat, empty_flat, memory_for
from distnadam.tensors.layout import sizes_of
from distnadam.transport.push_groups import PushGroups
from distnadam.transport.replication import ReplicationStream
from tests.simulation.connections import Connection, copied, pass_on
from tests.simulation.stream import InProcessStream

LIVELOCK = 300
DOOMS = (
    "before it is known",
    "before it is asked for",
    "before it is filled",
    "before it follows",
    "before the supervisor knows that the other does not",
    "once it follows",
)
"""When a shard may die while another standby takes the place of its present one."""


class Process:
    """A shard or a standby.

    `works` is what it is yet to compute; `crash` is when it dies by itself, "before" or "after" it
    sends a round to its standby, and `connection_ends` when the connection to its standby ends,
    though both live: "before" a round arrives, or "after", when it is not acknowledged any more.
    """

    def __init__(self, world: "World", spec: ShardSpec, *, standby: bool) -> None:
        self.world, self.spec, self.alive = world, spec, True
        self.number = len(world.all_processes)
        self.works: deque[Callable[[], None]] = deque()
        self.standby = Standby(spec) if standby else None
        self.host = None if standby else self.make_host(spec)

        self.crash = ""
        self.connection_ends = ""
        self._asked: list[Future[Any]] = []

    def make_host(self, spec: ShardSpec) -> ShardHost:
        world = self.world

        def on_notice(notice: Notice) -> None:
            if not self.alive:
                return
            if isinstance(notice.report, StandbyLost):
                world.reach("before the supervisor knows that the other does not", self)
                if not self.alive:
                    return
                # no answer leaves before the supervisor knows, by the lease
                world.supervisor.standby_is_stale(notice.report.standby)
            world.supervisor.notify(notice.report)

        host = ShardHost(spec, on_notice=on_notice, run_work=lambda work: self.works.append(work))
        host.connect_standby = self._attach
        host.gradients_of = lambda rank, incarnation, dtypes: world.memory(self, rank, incarnation)
        return host

    def send(self, message: Any) -> Future[Any]:
        """Give the shard or standby a message; the answer of one that dies is ShardLost."""
        future: Future[Any] = Future()
        if isinstance(message, DescribeStandby) and self.alive and self.standby is not None:
            future.set_result(self.standby.reached)
            return future
        if not self.alive or self.host is None:
            future.set_exception(ShardLost(f"shard {self.spec.index}: is dead"))
            return future
        self._asked.append(future)

        def answered(inner: Future[Any]) -> None:
            if self.alive and not future.done():
                error = inner.exception()
                future.set_exception(error) if error is not None else future.set_result(
                    inner.result()
                )

        self.host.send(message).add_done_callback(answered)
        return future

    def kill(self) -> None:
        self.alive = False
        self.works.clear()
        for future in self._asked:
            if not future.done():
                future.set_exception(ShardLost(f"shard {self.spec.index}: died"))
        self.world.end_connections(to=self)
        self.world.processes.died(self)

    def work(self) -> bool:
        """Do what is due first; return whether there was anything."""
        if self.works:
            self.works.popleft()()
            return True
        return False

    def _attach(
        self, standby: ShardProcess, control_state: Any, config: Any, state: ShardState
    ) -> ReplicationStream:
        is_near = self.spec.index % 2 == 0  # as one of the same machine, or of another
        given = state if is_near else state.arrays()
        self.world.reach("before it is filled", self)
        stream = _WorldStream(self, standby.handle, control_state, config, given)
        self.world.reach("before it follows", self)
        return stream


class _WorldStream(InProcessStream):
    """A stream whose connection may end, or primary die, before or after it has sent a round."""

    def __init__(
        self,
        primary: Process,
        follower: Process,
        control_state: Any,
        config: Any,
        state: dict[str, Flat] | ShardState,
    ) -> None:
        if follower.standby is None:
            raise ShardLost("the standby is dead")
        self._primary = primary
        self._has_ended = False
        super().__init__(
            follower.standby,
            control_state,
            config,
            state,
            lambda: primary.alive and follower.alive and not self._has_ended,
        )

    @override
    def send(self, record: Record) -> bool:
        crash = self._primary.crash if isinstance(record, ReplicatedRound) else ""
        if crash == "before":
            self._primary.kill()
        if self._primary.connection_ends == "before" and isinstance(record, ReplicatedRound):
            self._end_connection("lost")
        sent = super().send(record)
        if self.failure is not None:
            raise self.failure  # here every standby must follow
        if crash == "after" and sent:
            self._primary.kill()
        if self._primary.connection_ends and isinstance(record, ReplicatedRound) and sent:
            self._end_connection("arrived")
            return False
        return sent

    def _end_connection(self, what: str) -> None:
        self._has_ended = True
        self._primary.connection_ends = ""
        self._primary.world.note(f"a standby's connection ended, the round {what}")


class WorldProcesses(ProcessManager):
    """A world's processes, as its supervisor starts, reaches and ends them.

    Args:
        world: where they are.
        on_death: called with a watched process that ended; by default its supervisor's `notify`.
    """

    def __init__(
        self, world: "World", on_death: Callable[[ShardProcess], None] | None = None
    ) -> None:
        self._world = world
        self._on_death = on_death or (
            lambda process: world.supervisor.notify(ProcessDied(process=process))
        )
        self._watched: set[ShardProcess] = set()

    def died(self, handle: Process) -> None:
        """Report the end of a watched process."""
        for process in [each for each in self._watched if each.handle is handle]:
            self._watched.discard(process)
            self._on_death(process)

    @override
    def start(
        self,
        spec: ShardSpec,
        *,
        standby: bool,
        near: Sequence[ShardProcess],
        beside: ShardProcess | None = None,
    ) -> ShardProcess:
        with memory_for(f"shard {spec.index}: its state"):
            process = ShardProcess(spec.index, Process(self._world, spec, standby=standby), None)
        self._world.all_processes.append(process)
        if standby:
            self._world.reach("before it is known", self._world.shards[spec.index])
        return process

    @override
    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        process = standby.handle
        if not process.alive:
            raise ShardLost("the standby died")
        if process.standby is None:
            return standby  # asked again
        process.host, _ = process.standby.promote(reconfigure, process.make_host)
        process.standby = None
        return standby

    @override
    def fence(self, process: ShardProcess) -> None:
        if process.handle is not None and process.handle.alive:
            if process.handle in self._world.to_leave and process.handle.host is not None:
                self._world.note("a shard left its host")
            process.handle.kill()

    @override
    def is_to_leave(self, process: ShardProcess) -> bool:
        return process.handle in self._world.to_leave

    @override
    def terminate(self, *processes: ShardProcess) -> None:
        for each in processes:
            self.fence(each)

    @override
    def watch(self, process: ShardProcess) -> None:
        self._watched.add(process)
        if not process.handle.alive:
            self.died(process.handle)

    @override
    def control_state(self, process: ShardProcess) -> ShardControlState:
        host = process.handle.host
        if not process.handle.alive or host is None:
            raise ShardLost(f"shard {process.index}: is dead")
        state: ShardControlState = host.control_state
        return state

    @override
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        found = {index: targets[index].handle for index in messages if index in targets}
        asked = {index: process for index, process in found.items() if process is not None}
        lost = {
            index
            for index in asked
            if isinstance(messages[index], AbandonRank) and self._world.next_fault() == "lose"
        }
        futures = {
            index: process.send(messages[index])
            for index, process in asked.items()
            if index not in lost
        }
        answers: dict[int, Any] = {
            index: StepTimeout(f"shard {index}: the connection broke") for index in lost
        }
        for index in found.keys() - asked.keys():
            answers[index] = ShardLost(f"shard {index}: is missing")
        for index, future in futures.items():
            if isinstance(messages[index], AttachStandby):
                self._world.reach("before it is asked for", asked[index])
            while not future.done() and asked[index].work():
                pass
            if not future.done():
                answers[index] = StepTimeout(f"shard {index} is silent")
            else:
                answers[index] = future.exception() or future.result()
            if isinstance(messages[index], AttachStandby):
                self._world.reach("once it follows", asked[index])
        return answers


class _Inline(Executor):
    """Runs work at once in the caller's thread."""

    @override
    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*args, **kwargs))
        return future


class _Memory(RestoreMemory):
    """Keeps the record of restore points, whichever supervisor comes."""

    def __init__(self) -> None:
        self._record: bytes | None = None

    def read(self) -> bytes | None:
        return self._record

    def write(self, record: bytes) -> None:
        self._record = record


class World:
    """The processes of one optimizer and its supervisor, and the memory of its workers.

    `faults` are taken one by one by the messages of workers: "" delivers, "lose" loses the message,
    "lose answer" its answer, "repeat" delivers it twice, "delay" keeps it for `deliver_one`, with
    its own copy of the gradients. "lose" also befalls the supervisor's AbandonRank. With `objects`
    every message has its own copy; otherwise shards read what lies in the memory.

    With several `hosts`, ranks, `per_host` together, and processes are spread over them in turn,
    and a rank reaches the shards of other hosts by its host's connections (`Connection`), whose
    faults have the same names, in groups. `seen` counts what befell. `to_leave` are processes whose
    hosts are to be left. `doom` is the point of `DOOMS` at which the next shard dies that comes to
    it as it gets a standby.
    """

    def __init__(
        self,
        specs: Sequence[ShardSpec],
        *,
        replicas: int,
        objects: bool = False,
        hosts: int = 1,
        per_host: int = 1,
    ) -> None:
        self.objects = objects
        self.hosts = hosts
        self.per_host = per_host
        self.connected: dict[int, int] = {}
        self._groups: dict[tuple[int, Process], PushGroups] = {}
        self.connections: dict[tuple[int, Process], Connection] = {}
        self.seen: Counter[str] = Counter()
        self.all_processes: list[ShardProcess] = []
        self.memories: dict[tuple[int, int], Flat] = {}
        self.to_leave: set[Process] = set()
        self.doom = ""
        self.faults: deque[str] = deque()
        self.late: list[Callable[[], None]] = []
        self._waits = 0
        self.processes = WorldProcesses(self)
        self.restore_memory = _Memory()
        self.supervisor = self._make_supervisor(specs, replicas)
        self.supervisor.manage(
            [self.processes.start(spec, standby=False, near=[]) for spec in specs], {}
        )

    def _make_supervisor(self, specs: Sequence[ShardSpec], replicas: int) -> Supervisor:
        return Supervisor(
            specs, replicas, self.processes, memory=self.restore_memory, beside=_Inline()
        )

    def replace_supervisor(self) -> None:
        """Put a supervisor that knows nothing yet in place of the present one."""
        old = self.supervisor.cluster
        self.supervisor = self._make_supervisor(old.specs, old.specs[0].replicas)
        self.supervisor.manage(old.shards, old.standbys)
        self.supervisor.resync(initial=None, checkpoint=None)

    @property
    def shards(self) -> list[Process]:
        return [process.handle for process in self.supervisor.cluster.shards]

    @property
    def standbys(self) -> dict[int, Process]:
        return {
            index: process.handle for index, process in self.supervisor.cluster.standbys.items()
        }

    def look(self) -> None:
        """Have the supervisor handle its events, and decide until nothing is left."""
        self.supervisor.notify(LookNow())
        for _ in range(3):  # standbys are started, then filled
            self.supervisor.run_once()
            if not self.supervisor.has_events:
                break

    def work(self) -> bool:
        """Have every shard do what is due first; return whether anything was."""
        self.count_wait()
        return sum(process.work() for process in self.shards) > 0

    def release_held(self) -> bool:
        """Have time go by for pushes that wait for their group's; return whether any did."""
        waiting = [groups for groups in self._groups.values() if groups.is_waiting]
        for groups in waiting:
            groups.release()
        return bool(waiting)

    def count_wait(self) -> None:
        """Count that a caller waits; fail if nobody gets anywhere."""
        self._waits += 1
        assert self._waits < LIVELOCK, "everybody is busy and nobody comes further"

    def rested(self) -> None:
        """Start to count again how long a caller waits."""
        self._waits = 0

    def next_fault(self) -> str:
        """Take what is to befall the next message."""
        return self.faults.popleft() if self.faults else ""

    def deliver_one(self, which: int) -> None:
        """Deliver one of the messages that were delayed."""
        if self.late:
            self.late.pop(which % len(self.late))()

    def reach(self, point: str, shard: Process) -> None:
        """Have a shard come to a point of its way to a standby, and die there if it is doomed."""
        if point == self.doom and shard.alive:
            self.doom = ""
            self.note(f"a shard died {point}")
            shard.kill()

    def note(self, what: str) -> None:
        """Count what befell."""
        self.seen[what] += 1

    @property
    def incarnations(self) -> dict[int, int]:
        """The newest incarnation of each rank."""
        return dict(sorted(self.memories))

    def memory(self, process: Process, rank: int, incarnation: int) -> Flat | None:
        """Return what a process sees of a worker's gradients; None if they lie on another host."""
        flat = self.memories.get((rank, incarnation))
        if flat is None or self._host_of(rank) != process.number % self.hosts:
            return None
        return cut_flat(flat, process.spec.ranges)

    def end_connections(self, *, host: int | None = None, to: Process | None = None) -> None:
        """End the connections of a host, as its relay's death does, or to a process that died."""
        for (number, process), connection in list(self.connections.items()):
            if connection.is_open and (
                process is to if host is None else number == host % self.hosts
            ):
                connection.end()
        for (number, process), groups in list(self._groups.items()):
            if process is to if host is None else number == host % self.hosts:
                groups.release()

    def kill_worker(self, rank: int, incarnation: int) -> None:
        if self.connected.get(rank) == incarnation:
            del self.connected[rank]
        for groups in list(self._groups.values()):
            groups.gone(rank)
        for process in self.shards:
            process.send(WorkerDied(rank, incarnation))

    def transmit(self, process: Process, message: Any) -> Future[Any]:
        """Send a worker's message the way that the next fault says."""
        rank = getattr(message, "rank", None)
        if isinstance(rank, int) and self._host_of(rank) != process.number % self.hosts:
            return self._send_far(self._host_of(rank), process, message)
        fault = self.next_fault()
        outer: Future[Any] = Future()
        if fault in ("lose", "half"):
            outer.set_exception(ShardLost("the connection broke"))
            return outer
        if fault in ("delay", "delay answer"):
            later = copied(message)
            self.late.append(lambda: pass_on(process.send(later), outer))
            return outer
        if self.objects:
            message = copied(message)
        if fault == "repeat":
            process.send(message)
        answer = process.send(message)
        if fault == "lose answer":
            outer.set_exception(ShardLost("the connection broke"))
            return outer
        return answer

    def _host_of(self, rank: int) -> int:
        return rank // self.per_host % self.hosts

    def _send_far(self, host: int, process: Process, message: Any) -> Future[Any]:
        """Send a worker's message to a shard of another host, a push with its group's."""
        if not isinstance(message, Push):
            return self._connection(host, process).send(message, self.next_fault())
        outer: Future[Any] = Future()

        def reply(answer: Any) -> None:
            if isinstance(answer, BaseException):
                outer.set_exception(answer)
            else:
                outer.set_result(answer)

        if (host, process) not in self._groups:
            self._groups[host, process] = self._make_groups(host, process)
        self._groups[host, process].put(message, reply)
        return outer

    def _make_groups(self, host: int, process: Process) -> PushGroups:
        spec = process.spec

        def send(message: Push | GroupPush, reply: Callable[[Any], None]) -> None:
            is_group = isinstance(message, GroupPush)
            if is_group:
                self.note("pushed as one")

            def answered(done: Future[Any]) -> None:
                answer = done.exception() or done.result()
                if is_group and isinstance(answer, GroupChanged):
                    self.note("taken apart")
                reply(answer)

            connection = self._connection(host, process)
            connection.send(message, self.next_fault()).add_done_callback(answered)

        return PushGroups(
            num_workers=spec.num_workers,
            sum_group=spec.config.sum_group,
            send=send,
            connected=lambda: [rank for rank in self.connected if self._host_of(rank) == host],
            lend=lambda: empty_flat(sizes_of(spec.ranges)),
        )

    def _connection(self, host: int, process: Process) -> Connection:
        connection = self.connections.get((host, process))
        if connection is None or not connection.is_open:
            connection = self.connections[host, process] = Connection(self, process)
        return connection
