"""How a supervisor that lives in a Ray actor makes, reaches and ends the actors of its shards."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from distnadam.backends.ray import registry
from distnadam.backends.ray.calls import gather_with_retry, retry_until_answered
from distnadam.backends.ray.fencing import Fencing
from distnadam.backends.ray.processes import kill_actor, process_start_time
from distnadam.errors import ShardLost
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load, Reconfigure
from distnadam.supervision.discovery import DiscoveredProcess, RecoveredTopology, recovered_topology
from distnadam.supervision.process_manager import Cuts, ProcessManager, ShardProcess
from distnadam.tensors.copy_plan import copy_plan
from distnadam.tensors.layout import Ranges
from distnadam.transport.connection import Address
from distnadam.transport.process_watch import ProcessWatch


@dataclass(frozen=True)
class ActorFactory:
    """What needs `ray.remote`: `make_shard` takes a spec, the supervisor, a label, and nodes silent
    and to be apart from; see `actors`.
    """

    make_shard: Callable[[ShardSpec, Any, str | None, Collection[str], Collection[str]], Any]
    kill_on: registry.EndOn
    start_time_on: Callable[[str, int], Any]


OPEN_S = 120.0
"""Seconds in which a process of the optimizer starts, and opens."""
_MOVE_S = 3600.0
_MEET_S = 5.0
_SLICE_S = 0.05


class RayProcessManager(ProcessManager):
    """Processes as Ray actors.

    Args:
        supervisor: the supervisor's own actor, which shards tell what happens.
        run: begins the names of the optimizer's processes.
        tools: makes actors, and ends processes of other nodes.
        on_death: told which process ended.
        lasts_s: seconds for which a shard's leave lasts.
    """

    def __init__(
        self,
        supervisor: Any,
        run: str,
        factory: ActorFactory,
        on_death: Callable[[ShardProcess], None],
        lasts_s: float,
    ) -> None:
        self._supervisor, self._run, self._factory, self._on_death = (
            supervisor,
            run,
            factory,
            on_death,
        )
        self._own = registry.enter(run)
        self._node = self._own.node
        self._watch = ProcessWatch()
        self._ended: set[Any] = set()
        self._births: dict[str, Any] = {}  # by token: an answer on its way from another node
        self.fencing = Fencing(run, factory.kill_on, self._ended, lasts_s)

    def make(
        self, spec: ShardSpec, *, standby: bool = False, apart_from: Collection[str] = ()
    ) -> Any:
        """Return a new actor, which may not have started yet, on none of those nodes where there is
        another.
        """
        label, silent = registry.label_of(spec, standby=standby), self.fencing.silent.now
        actor = self._factory.make_shard(spec, self._supervisor, label, silent, apart_from)
        self.fencing.admit(actor)
        return actor

    def start(
        self, spec: ShardSpec, *, standby: bool, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        """See `ProcessManager.start`."""
        primary = [
            process.place.node for process in near if standby and process.index == spec.index
        ]
        actor = self.make(spec, standby=standby, apart_from=primary)
        try:
            place = retry_until_answered(actor.place.remote, timeout_s=OPEN_S)
            neighbour = self._neighbour(place.node, near)
            place = retry_until_answered(
                lambda: actor.open.remote(neighbour, standby=standby), timeout_s=OPEN_S
            )
        except Exception as error:
            kill_actor(actor)
            raise ShardLost(
                f"shard {spec.index}: a process for it could not be had: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return ShardProcess(spec.index, actor, place)

    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        """See `ProcessManager.promote`."""
        neighbour = self._neighbour(standby.place.node, near)
        answer = gather_with_retry(
            {0: lambda: standby.handle.promote.remote(reconfigure, neighbour)}, OPEN_S
        )[0]
        if isinstance(answer, Exception):
            raise ShardLost(f"the standby of shard {standby.index}: {answer}") from answer
        return dataclasses.replace(standby, place=answer)

    def fence(self, process: ShardProcess) -> None:
        """See `ProcessManager.fence`."""
        self.fencing.fence(process)

    def is_leader(self) -> bool:
        """See `ProcessManager.is_leader`."""
        return self.fencing.leases.is_leader

    def terminate(self, *processes: ShardProcess) -> None:
        """See `ProcessManager.terminate`."""
        self.fencing.terminate(*processes)

    def discover(self, first: ShardSpec) -> RecoveredTopology:
        """Find the processes of an optimizer whose supervisor died, and end those that do not
        answer, or are not needed any more.
        """
        asked = {actor.introduce.remote(): actor for actor in registry.actors_of(self._run)}
        discovered: list[DiscoveredProcess] = []
        for ref in (
            ray.wait(list(asked), num_returns=len(asked), timeout=_MEET_S)[0] if asked else []
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
            spare=[self._own, *(each.process.place for each in discovered)],
        )
        answered = {each.process.handle for each in discovered}
        for actor in asked.values():
            if actor not in answered:
                kill_actor(actor)
        found = recovered_topology(first, discovered)
        self.terminate(*found.spare)
        return found

    def is_dead(self, token: str) -> bool:
        """See `ProcessManager.is_dead`; a process of another node is asked about there, and the
        answer is there the next time.
        """
        node, *process = token.split("/")
        if len(process) != 3:
            return False
        pid, born = int(process[0]), process[1]
        if node == self._node:
            return process_start_time(pid) != born
        if token not in self._births:
            self._births[token] = self._factory.start_time_on(node, pid)
        ref = self._births[token]
        if not ray.wait([ref], timeout=0)[0]:
            return False
        del self._births[token]
        try:
            return bool(ray.get(ref) != born)
        except Exception:
            return not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())

    def watch(self, process: ShardProcess) -> None:
        """See `ProcessManager.watch`: by a socket on this node, which tells at once, and by Ray
        everywhere.
        """

        def ended(future: Any = None) -> None:
            if future is not None and isinstance(future.exception(), ActorUnavailableError):
                threading.Timer(_SLICE_S, wait).start()  # only the call was lost
                return
            self._ended.add(process.handle)
            self._on_death(process)

        def wait() -> None:
            process.handle.forever.remote().future().add_done_callback(ended)

        wait()
        if process.place.node == self._node and process.place.address is not None:
            self._watch.add(process.place.address, ended)

    def move(
        self,
        token: str,
        old: Sequence[ShardProcess],
        new: Sequence[ShardProcess],
        cuts: Cuts,
        order: Load,
    ) -> list[Exception]:
        """See `ProcessManager.move`; the arrays go from actor to actor."""
        control_state = gather_with_retry({0: old[0].handle.control_state.remote}, OPEN_S)[0]
        if isinstance(control_state, Exception):
            return [control_state]
        order = dataclasses.replace(order, control_state=control_state)

        def install(process: ShardProcess, ranges: Ranges) -> Any:
            plan = copy_plan(cuts[0], ranges)
            parts = [old[copy.source].handle.part.remote(token, copy) for copy in plan]
            return process.handle.install.remote(order, plan, *parts)

        calls = {
            process.index: partial(install, process, ranges)
            for process, ranges in zip(new, cuts[1], strict=True)
        }
        return [
            answer
            for answer in gather_with_retry(calls, _MOVE_S).values()
            if isinstance(answer, Exception)
        ]

    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        """See `ProcessManager.ask`; None asks a standby how far it is."""
        asked = {i: targets[i].handle for i in messages if i in targets}
        calls = {i: partial(self._send, actor, messages[i]) for i, actor in asked.items()}
        return gather_with_retry(
            calls, timeout_s, lambda: {i for i, actor in asked.items() if actor in self._ended}
        )

    def _send(self, actor: Any, message: Any) -> Any:
        return actor.reached.remote() if message is None else actor.send.remote(message)

    def _neighbour(self, node: str, near: Sequence[ShardProcess]) -> Address | None:
        return next(
            (
                process.place.address
                for process in near
                if process.place.node == node and process.place.address is not None
            ),
            None,
        )
