"""How a supervisor in a Ray actor starts, reaches and ends the actors of its shards."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from typing_extensions import override

from distnadam.backends.ray import registry
from distnadam.backends.ray.calls import (
    gather_with_retry,
    retry_in_background,
    retry_until_answered,
)
from distnadam.backends.ray.cordon import Cordon
from distnadam.backends.ray.fencing import Fencing, actor_id
from distnadam.backends.ray.placement import Avoid
from distnadam.backends.ray.processes import kill_actor, process_start_time
from distnadam.errors import DistNadamError, InsufficientResources, ShardLost
from distnadam.planning import room
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import (
    DescribeStandby,
    Load,
    Reconfigure,
    ShardControlState,
)
from distnadam.supervision.discovery import DiscoveredProcess, RecoveredTopology, recovered_topology
from distnadam.supervision.process_manager import MOVE_S, Move, ProcessManager, ShardProcess
from distnadam.tensors.copy_plan import copy_plan
from distnadam.tensors.layout import Ranges
from distnadam.transport.process_watch import ProcessWatch
from distnadam.transport.unix_connection import Address


@dataclass(frozen=True)
class ActorFactory:
    """What needs `ray.remote`, from `actors`, which imports this module."""

    make_shard: Callable[[ShardSpec, Any, str | None, Avoid, str | None], Any]
    make_relay: Callable[[str | None, str, str], Any]
    kill_on: registry.KillOn
    start_time_on: Callable[[str, int], Any]


OPEN_S = 120.0
"""Seconds in which a process of the optimizer starts, and opens."""
_DISCOVER_S = 5.0


class RayProcessManager(ProcessManager):
    """Processes as Ray actors.

    It knows whose end Ray or a socket has reported, so that calls under way need not wait for a
    dead actor; whether a silent one counts as dead is `ClusterState`'s to know.

    Args:
        supervisor: the supervisor's own actor, which shards report to.
        run: begins the names of the optimizer's processes.
        factory: makes actors, and ends processes of other nodes.
        on_death: called with a watched process that ended.
        lease_s: seconds for which a shard's lease is valid.
        cordon: which nodes are to be left.
    """

    def __init__(
        self,
        supervisor: Any,
        run: str,
        factory: ActorFactory,
        on_death: Callable[[ShardProcess], None],
        lease_s: float,
        cordon: Cordon,
    ) -> None:
        self._cordon = cordon
        self._supervisor = supervisor
        self._run = run
        self._factory = factory
        self._on_death = on_death
        self._own = registry.register(run)
        self._watch = ProcessWatch()
        self._ended: set[str] = set()  # by id: a handle would keep what Ray has of the actor
        self._births: dict[str, Any] = {}
        # the node of shards that have no state yet, and what that takes
        self._empty: dict[Any, tuple[str, int]] = {}
        self.fencing = Fencing(run, factory.kill_on, self._ended, lease_s)

    def make(
        self,
        spec: ShardSpec,
        *,
        standby: bool = False,
        apart_from: Collection[str] = (),
        on: str | None = None,
    ) -> Any:
        """Return a new actor, which may not have started yet.

        Args:
            spec: its shard's.
            standby: whether it is to be the standby.
            apart_from: nodes to avoid whenever any other node qualifies.
            on: the node to prefer, if it is none to avoid.
        """
        label = registry.label_of(spec, standby=standby)
        avoid = Avoid(
            unreachable=self.fencing.unreachable.now,
            apart_from=apart_from,
            cordoned=self._cordon.to_leave(),  # one that died may have nowhere else to go
        )
        actor = self._factory.make_shard(spec, self._supervisor, label, avoid, on)
        self.fencing.admit(actor)
        return actor

    @override
    def start(
        self,
        spec: ShardSpec,
        *,
        standby: bool,
        near: Sequence[ShardProcess],
        beside: ShardProcess | None = None,
    ) -> ShardProcess:
        primary = [
            process.address.node for process in near if standby and process.index == spec.index
        ]
        on = None if beside is None else beside.address.node
        actor = self.make(spec, standby=standby, apart_from=primary, on=on)
        try:
            address = retry_until_answered(actor.address.remote, timeout_s=OPEN_S)
            neighbour = self._neighbour(address.node, near)
            promised = sum(size for node, size in self._empty.values() if node == address.node)
            address = retry_until_answered(
                lambda: actor.open.remote(neighbour, standby=standby, promised=promised),
                timeout_s=OPEN_S,
            )
        except Exception as error:
            kill_actor(actor)
            if isinstance(error, InsufficientResources):
                raise
            raise ShardLost(
                f"shard {spec.index}: no process for it could be started: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if not standby:
            self._empty[actor] = address.node, room.state([spec]).num_bytes
        return ShardProcess(spec.index, actor, address)

    @override
    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        neighbour = self._neighbour(standby.address.node, near)
        answer = gather_with_retry(
            {0: lambda: standby.handle.promote.remote(reconfigure, neighbour)}, OPEN_S
        )[0]
        if isinstance(answer, Exception):
            raise ShardLost(f"the standby of shard {standby.index}: {answer}") from answer
        return dataclasses.replace(standby, address=answer)

    @override
    def fence(self, process: ShardProcess) -> None:
        self._forget([process])
        self.fencing.fence(process)

    @override
    def is_to_leave(self, process: ShardProcess) -> bool:
        return process.handle is not None and process.address.node in self._cordon.to_leave()

    @override
    def is_leader(self) -> bool:
        return self.fencing.leases.is_leader

    @override
    def terminate(self, *processes: ShardProcess) -> None:
        self._forget(processes)
        self.fencing.terminate(*processes)

    def discover(self, first: ShardSpec) -> RecoveredTopology:
        """Find the processes of an optimizer whose supervisor died.

        Those that do not answer, or are not needed any more, are ended.
        """
        asked = {actor.introduce.remote(): actor for actor in registry.actors_of(self._run)}
        discovered: list[DiscoveredProcess] = []
        for ref in (
            ray.wait(list(asked), num_returns=len(asked), timeout=_DISCOVER_S)[0] if asked else []
        ):
            with contextlib.suppress(Exception):  # it died
                answer = ray.get(ref)
                discovered.append(
                    dataclasses.replace(
                        answer, process=dataclasses.replace(answer.process, handle=asked[ref])
                    )
                )
        registry.kill_all(
            self._run,
            self._factory.kill_on,
            keep=[self._own, *(each.process.address for each in discovered)],
        )
        answered = {each.process.handle for each in discovered}
        for actor in asked.values():
            if actor not in answered:
                kill_actor(actor)
        found = recovered_topology(first, discovered)
        self.terminate(*found.spare)
        return found

    @override
    def is_dead(self, token: str) -> bool:
        node, *process = token.split("/")
        if len(process) != 3:
            return False
        pid, born = int(process[0]), process[1]
        if node == self._own.node:
            return process_start_time(pid) != born
        if not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes()):
            # what a host that is cut off was asked before may never be answered
            self._births.pop(token, None)
            return True
        if token not in self._births:  # asked on that node; a later call has the answer
            self._births[token] = self._factory.start_time_on(node, pid)
        ref = self._births[token]
        if not ray.wait([ref], timeout=0)[0]:
            return False
        del self._births[token]
        try:
            return bool(ray.get(ref) != born)
        except Exception:  # its node died just now, or the question's own process: ask again
            return False

    @override
    def watch(self, process: ShardProcess) -> None:
        def ended() -> None:
            self._ended.add(actor_id(process.handle))
            self._on_death(process)

        # Ray takes seconds to notice; a socket on this node says so at once
        retry_in_background(process.handle.linger.remote, on_death=ended)
        if process.address.node == self._own.node and process.address.socket is not None:
            self._watch.add(process.address.socket, ended)

    @override
    def control_state(self, process: ShardProcess) -> ShardControlState:
        if process.handle is None:
            raise ShardLost(f"shard {process.index}: is missing")
        answer = gather_with_retry({0: process.handle.control_state.remote}, OPEN_S)[0]
        if isinstance(answer, Exception):
            raise answer
        state: ShardControlState = answer
        return state

    @override
    def move(self, move: Move) -> list[Exception]:
        try:  # the arrays go from actor to actor, not through this process
            control_state = self.control_state(move.old[0])
        except DistNadamError as error:
            return [error]
        load = dataclasses.replace(move.load, control_state=control_state)

        def install(process: ShardProcess, ranges: Ranges) -> Any:
            plan = copy_plan(move.old_cuts, ranges)
            parts = [move.old[copy.source].handle.part.remote(move.token, copy) for copy in plan]
            return process.handle.install.remote(load, plan, *parts)

        calls = {
            process.index: partial(install, process, ranges)
            for process, ranges in zip(move.new, move.new_cuts, strict=True)
        }
        answers = gather_with_retry(calls, MOVE_S).values()
        self._forget(move.new)
        return [answer for answer in answers if isinstance(answer, Exception)]

    @override
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        asked = {index: targets[index].handle for index in messages if index in targets}
        answers: dict[int, Any] = {
            index: ShardLost(f"shard {index}: is missing")  # a predecessor's, and not found
            for index, actor in asked.items()
            if actor is None
        }
        calls = {
            index: partial(_send, actor, messages[index])
            for index, actor in asked.items()
            if actor is not None
        }
        answers |= gather_with_retry(
            calls,
            timeout_s,
            lambda: {index for index in calls if actor_id(asked[index]) in self._ended},
        )
        self._forget(targets[i] for i, each in messages.items() if isinstance(each, Load))
        return answers

    def _forget(self, processes: Iterable[ShardProcess]) -> None:
        """Take it that these have their state, or need none any more."""
        for process in processes:
            self._empty.pop(process.handle, None)

    def _neighbour(self, node: str, near: Sequence[ShardProcess]) -> Address | None:
        return next(
            (
                process.address.socket
                for process in near
                if process.address.node == node and process.address.socket is not None
            ),
            None,
        )


def _send(actor: Any, message: Any) -> Any:
    if isinstance(message, DescribeStandby):
        return actor.reached.remote()
    return actor.send.remote(message)
