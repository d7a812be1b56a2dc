"""The supervisor as it lives in a Ray actor, and how it reaches, makes and ends the actors of its shards."""

import asyncio
import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from distnadam.backends import registry
from distnadam.backends.cluster import all_answered, kill, node_facts, process_born, until_answered
from distnadam.backends.exporter import Exporter
from distnadam.backends.fencing import Fencing
from distnadam.backends.gather import insist_on
from distnadam.backends.lease import lease_s
from distnadam.backends.link import Place
from distnadam.errors import ShardLost
from distnadam.layout import Ranges
from distnadam.messages import ShardSpec
from distnadam.meter import Sample, state_bytes
from distnadam.orders import Load, Reign
from distnadam.reshard import copy_plan
from distnadam.supervision.crew import Crew, Cuts, Hired, Roster
from distnadam.supervision.succession import Met, Succession, succession
from distnadam.supervision.supervisor import Supervisor
from distnadam.transport.doorbell import Address
from distnadam.transport.watch import Watch


@dataclass(frozen=True)
class Tools:
    """What needs `ray.remote`: `make_shard(spec, supervisor, label, apart_from)` returns an actor, the others references; see `actors`."""

    make_shard: Callable[[ShardSpec, Any, str | None, str | None], Any]
    end_on: registry.EndOn
    born_on: Callable[[str, int], Any]


_OPEN_S = 120.0
_MOVE_S = 3600.0
_MEET_S = 5.0
_SLICE_S = 0.05


class RayCrew(Crew):
    """Processes as Ray actors.

    Args:
        supervisor: the supervisor's own actor, which shards tell what happens.
        run: begins the names of the optimizer's processes.
        tools: makes actors, and ends processes of other nodes.
        on_death: told which process ended.
        lasts_s: seconds for which a shard's leave lasts.
    """

    def __init__(self, supervisor: Any, run: str, tools: Tools, on_death: Callable[[Hired], None], lasts_s: float) -> None:
        self._supervisor, self._run, self._tools, self._on_death = supervisor, run, tools, on_death
        self._own = registry.enter(run)
        self._node = self._own.node
        self._watch = Watch()
        self._ended: set[Any] = set()
        self._births: dict[str, Any] = {}  # by token: an answer on its way from another node
        self.fencing = Fencing(run, tools.end_on, self._ended, lasts_s)

    def make(self, spec: ShardSpec, *, standby: bool = False, apart_from: str | None = None) -> Any:
        """Return a new actor, which may not have started yet, on another node than that one where there is another."""
        actor = self._tools.make_shard(spec, self._supervisor, registry.label_of(spec, standby=standby), apart_from)
        self.fencing.admit(actor)
        return actor

    def hire(self, spec: ShardSpec, *, standby: bool, near: Sequence[Hired]) -> Hired:
        """See `Crew.hire`."""
        primary = next((hired.place.node for hired in near if hired.index == spec.index), None) if standby else None
        actor = self.make(spec, standby=standby, apart_from=primary)
        try:
            place = until_answered(actor.place.remote, timeout_s=_OPEN_S)
            neighbour = self._neighbour(place.node, near)
            place = until_answered(lambda: actor.open.remote(neighbour, standby=standby), timeout_s=_OPEN_S)
        except Exception as error:
            kill(actor)
            raise ShardLost(f"shard {spec.index}: a process for it could not be had: {str(error).splitlines()[0]}") from error
        return Hired(spec.index, actor, place)

    def promote(self, standby: Hired, reign: Reign, *, near: Sequence[Hired]) -> Hired:
        """See `Crew.promote`."""
        neighbour = self._neighbour(standby.place.node, near)
        answer = insist_on({0: lambda: standby.handle.promote.remote(reign, neighbour)}, _OPEN_S)[0]
        if isinstance(answer, Exception):
            raise ShardLost(f"the standby of shard {standby.index}: {answer}") from answer
        return dataclasses.replace(standby, place=answer)

    def fence(self, hired: Hired) -> None:
        """See `Crew.fence`."""
        self.fencing.fence(hired)

    def in_charge(self) -> bool:
        """See `Crew.in_charge`."""
        return self.fencing.leases.in_charge

    def dismiss(self, *hired: Hired) -> None:
        """See `Crew.dismiss`."""
        self.fencing.dismiss(*hired)

    def meet(self, first: ShardSpec) -> Succession:
        """Find the processes of an optimizer whose supervisor died, and end those that do not answer, or are not needed any more."""
        asked = {actor.introduce.remote(): actor for actor in registry.actors_of(self._run)}
        met: list[Met] = []
        for ref in ray.wait(list(asked), num_returns=len(asked), timeout=_MEET_S)[0] if asked else []:
            with contextlib.suppress(Exception):  # it died
                answer = ray.get(ref)
                met.append(dataclasses.replace(answer, hired=dataclasses.replace(answer.hired, handle=asked[ref])))
        registry.sweep(self._run, self._tools.end_on, spare=[self._own, *(each.hired.place for each in met)])
        answered = {each.hired.handle for each in met}
        for actor in asked.values():
            if actor not in answered:
                kill(actor)
        found = succession(first, met)
        self.dismiss(*found.spare)
        return found

    def has_ended(self, token: str) -> bool:
        """See `Crew.has_ended`; a process of another node is asked about there, and the answer is there the next time."""
        node, *process = token.split("/")
        if len(process) != 3:
            return False
        pid, born = int(process[0]), process[1]
        if node == self._node:
            return process_born(pid) != born
        if token not in self._births:
            self._births[token] = self._tools.born_on(node, pid)
        ref = self._births[token]
        if not ray.wait([ref], timeout=0)[0]:
            return False
        del self._births[token]
        try:
            return bool(ray.get(ref) != born)
        except Exception:
            return not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())

    def watch(self, hired: Hired) -> None:
        """See `Crew.watch`: by a socket on this node, which tells at once, and by Ray everywhere."""

        def ended(future: Any = None) -> None:
            if future is not None and isinstance(future.exception(), ActorUnavailableError):
                threading.Timer(_SLICE_S, wait).start()  # only the call was lost
                return
            self._ended.add(hired.handle)
            self._on_death(hired)

        def wait() -> None:
            hired.handle.forever.remote().future().add_done_callback(ended)

        wait()
        if hired.place.node == self._node and hired.place.address is not None:
            self._watch.add(hired.place.address, ended)

    def move(self, token: str, old: Sequence[Hired], new: Sequence[Hired], cuts: Cuts, order: Load) -> list[Exception]:
        """See `Crew.move`; the arrays go from actor to actor."""
        standing = insist_on({0: old[0].handle.standing.remote}, _OPEN_S)[0]
        if isinstance(standing, Exception):
            return [standing]
        order = dataclasses.replace(order, standing=standing)

        def install(hired: Hired, ranges: Ranges) -> Any:
            plan = copy_plan(cuts[0], ranges)
            parts = [old[copy.source].handle.part.remote(token, copy) for copy in plan]
            return hired.handle.install.remote(order, plan, *parts)

        calls = {hired.index: partial(install, hired, ranges) for hired, ranges in zip(new, cuts[1], strict=True)}
        return [answer for answer in insist_on(calls, _MOVE_S).values() if isinstance(answer, Exception)]

    def ask(self, hired: Mapping[int, Hired], messages: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """See `Crew.ask`; None asks a standby how far it is."""
        asked = {i: hired[i].handle for i in messages if i in hired}
        calls = {i: partial(self._send, actor, messages[i]) for i, actor in asked.items()}
        return insist_on(calls, timeout_s, lambda: {i for i, actor in asked.items() if actor in self._ended})

    def _send(self, actor: Any, message: Any) -> Any:
        return actor.reached.remote() if message is None else actor.send.remote(message)

    def _neighbour(self, node: str, near: Sequence[Hired]) -> Address | None:
        return next((hired.place.address for hired in near if hired.place.node == node and hired.place.address is not None), None)


class SupervisorActor:
    """A `Supervisor`, its shards being this actor's children; a named one, made again by Ray, finds them by their names."""

    def __init__(self, specs: Sequence[ShardSpec], replicas: int, tools: Tools) -> None:
        context = ray.get_runtime_context()
        lasts_s = lease_s(specs[0].options.shard_timeout_s)
        self._crew = RayCrew(context.current_actor, specs[0].run, tools, self._died, lasts_s)
        self._made: list[Any] = []
        self._exporter = Exporter.start(specs[0].name, specs[0].options)
        if self._exporter is not None:
            self._exporter.meter.sources.append(self._samples)
        self._opening, self._opened = asyncio.Lock(), False
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # of Ray's, in Ray's own lines
            again = context.was_current_actor_reconstructed
        found = self._crew.meet(specs[0]) if again else None
        self._specs = specs if found is None else found.specs
        self._supervisor = Supervisor(self._specs, replicas, self._crew)
        if found is not None:
            self._succeed(found)

    async def hire(self) -> list[Any]:
        """Make the shards' actors, which may not have started yet, and return them; asked again, return the same."""
        self._made = self._made or [self._crew.make(spec) for spec in self._specs]
        return self._made

    async def open(self) -> Roster:
        """Have the first shard of each node make the node's parameter memory, then the others join it; asked again, say where they are."""
        async with self._opening:
            if not self._opened:
                await asyncio.to_thread(self._open)
                self._opened = True
        return await self.roster(0)

    def _open(self) -> None:
        actors = dict(enumerate(self._made))
        nodes = {i: place.node for i, place in all_answered(actors, lambda i: actors[i].place.remote(), timeout_s=_OPEN_S).items()}
        firsts = {node: min(i for i in nodes if nodes[i] == node) for node in nodes.values()}
        places = all_answered(firsts.values(), lambda i: actors[i].open.remote(None), timeout_s=_OPEN_S)
        near = {node: places[i].address for node, i in firsts.items()}
        places |= all_answered(actors.keys() - places.keys(), lambda i: actors[i].open.remote(near[nodes[i]]), timeout_s=_OPEN_S)
        self._supervisor.adopt([Hired(i, actors[i], places[i]) for i in sorted(actors)], {})

    async def begin(self, directory: str | None, *initial: Any) -> None:
        """Start the watch; `initial` are the first parameters by space, in the order of their names."""
        spaces = sorted(self._specs[0].layout.sizes)
        flat = dict(zip(spaces, initial, strict=True)) if initial else None
        await asyncio.to_thread(lambda: self._supervisor.begin(initial=flat, directory=directory))

    async def roster(self, newer_than: int, *, suspect: bool = False) -> Roster:
        """See `Supervisor.roster`."""
        return await asyncio.wrap_future(self._supervisor.roster(newer_than, suspect))

    async def leave(self, who: str, lost: Hired | None) -> bool | None:
        """Give a shard leave, as `Leases.ask` has it; `lost` is a standby on another node that it has gone on without."""
        if lost is not None:
            self._supervisor.outdated(lost)
        return self._crew.fencing.leases.ask(who)

    async def notice(self, what: str, rank: int, incarnation: int) -> None:
        """See `Supervisor.notice`."""
        self._supervisor.notice(what, rank, incarnation)

    async def changing(self, what: str) -> None:
        """See `Supervisor.changing`."""
        self._supervisor.changing(what)

    async def changes(self) -> int:
        """See `Supervisor.changes`."""
        return self._supervisor.changes()

    async def saved(self, root: str, changes: int) -> None:
        """See `Supervisor.saved`."""
        self._supervisor.saved(root, changes)

    async def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """See `Supervisor.reshard`."""
        await asyncio.wrap_future(self._supervisor.reshard(num_shards, cuts))

    async def lost_ranks(self) -> dict[int, int]:
        """See `Supervisor.lost_ranks`."""
        return self._supervisor.lost_ranks()

    async def about(self) -> dict[str, Any]:
        """Return what `node_facts` says here, what was recovered from, and by its shard's index the node of each standby."""
        return {**node_facts(), **self._supervisor.recoveries(), "standbys": {i: p.node for i, p in self._supervisor.standbys().items()}}

    async def specs(self) -> Sequence[ShardSpec]:
        """Return the shards' specs."""
        return self._supervisor.specs()

    async def close(self) -> None:
        """See `Supervisor.close`."""
        await asyncio.to_thread(self._supervisor.close)

    def _samples(self) -> Iterator[Sample]:
        sizes = [state_bytes(spec.ranges) for spec in self._supervisor.specs()]
        yield "distnadam_recoveries_total", {}, sum(self._supervisor.recoveries().values())
        yield "distnadam_shard_imbalance", {}, max(sizes) * len(sizes) / max(1, sum(sizes))

    def _died(self, hired: Hired) -> None:
        self._supervisor.died(hired)

    def _succeed(self, found: Succession) -> None:
        """Take over what was found; what is missing counts as dead."""
        everyone = {i: found.shards.get(i) or Hired(i, None, Place("")) for i in range(len(found.specs))}
        self._made, self._opened = [hired.handle for hired in everyone.values()], True
        for hired in (*everyone.values(), *found.standbys.values()):
            self._crew.fencing.inherit(hired)
        self._supervisor.adopt(list(everyone.values()), found.standbys, [hired for i, hired in everyone.items() if i not in found.shards])
        threading.Thread(target=self._supervisor.begin, kwargs={"initial": None, "directory": None}, daemon=True).start()
