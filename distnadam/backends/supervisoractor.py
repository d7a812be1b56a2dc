"""The supervisor as it lives in a Ray actor, and how it reaches, makes and ends the actors of its shards."""

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from distnadam.backends.cluster import NAMESPACE, kill, node_facts, token_has_ended
from distnadam.backends.fencing import Fencing
from distnadam.backends.lease import lease_s
from distnadam.backends.link import Place
from distnadam.errors import ClusterError, DistNadamError, ShardLost, ShardUnavailable, StepTimeout
from distnadam.layout import Ranges
from distnadam.messages import ShardSpec
from distnadam.orders import Load, Reign
from distnadam.reshard import copy_plan
from distnadam.supervision.crew import Crew, Cuts, Hired, Roster
from distnadam.supervision.supervisor import Supervisor
from distnadam.transport.doorbell import Address, Watch


@dataclass(frozen=True)
class Tools:
    """What needs `ray.remote`: `make_shard(spec, supervisor, label, apart_from)` is an actor, `end_on(node, pid, born)` a reference."""

    make_shard: Callable[[ShardSpec, Any, str | None, str | None], Any]
    end_on: Callable[[str, int, str], Any]


_OPEN_S = 120.0
_MOVE_S = 3600.0
_FENCE_S = 5.0
_SLICE_S = 0.05
_TRIES = 5


class RayCrew(Crew):
    """Processes as Ray actors.

    Args:
        supervisor: the supervisor's own actor, which shards tell what happens.
        name: the optimizer's, where it outlives who made it.
        tools: makes actors, and ends processes of other nodes.
        on_death: told which process ended.
        lasts_s: seconds for which a shard's leave lasts.
    """

    def __init__(self, supervisor: Any, name: str | None, tools: Tools, on_death: Callable[[Hired], None], lasts_s: float) -> None:
        self._supervisor, self._name, self._tools, self._on_death = supervisor, name, tools, on_death
        self._node = ray.get_runtime_context().get_node_id()
        self._watch = Watch()
        self._ended: set[Any] = set()
        self.fencing = Fencing(tools.end_on, self._ended, lasts_s)
        self._facts: dict[Any, dict[str, str]] = {}

    def make(self, spec: ShardSpec, *, standby: bool = False, apart_from: str | None = None) -> Any:
        """Return a new actor, which may not have started yet, on another node than that one where there is another."""
        label = f"{spec.name}/{spec.index}{'s' if standby else ''}-{os.urandom(4).hex()}" if spec.name is not None else None
        actor = self._tools.make_shard(spec, self._supervisor, label, apart_from)
        self.fencing.admit(actor)
        return actor

    def hire(self, spec: ShardSpec, *, standby: bool, near: Sequence[Hired]) -> Hired:
        """See `Crew.hire`."""
        primaries = [hired.place.node for hired in near if standby and hired.index == spec.index]
        actor = self.make(spec, standby=standby, apart_from=next(iter(primaries), None))
        try:
            place = ray.get(actor.place.remote(), timeout=_OPEN_S)
            place = ray.get(actor.open.remote(self._neighbour(place.node, near), standby=standby), timeout=_OPEN_S)
        except Exception as error:
            kill(actor)
            raise ShardLost(f"shard {spec.index}: a process for it could not be had: {str(error).splitlines()[0]}") from error
        return Hired(spec.index, actor, place)

    def promote(self, standby: Hired, reign: Reign, *, near: Sequence[Hired]) -> Hired:
        """See `Crew.promote`."""
        neighbour = self._neighbour(standby.place.node, near)
        answer = self._get({0: standby.handle.promote.remote(reign, neighbour)}, _OPEN_S)[0]
        if isinstance(answer, Exception):
            raise ShardLost(f"the standby of shard {standby.index}: {answer}") from answer
        return dataclasses.replace(standby, place=answer)

    def fence(self, hired: Hired) -> None:
        """See `Crew.fence`."""
        self.fencing.fence(hired, self._facts.get(hired.handle))

    def in_charge(self) -> bool:
        """See `Crew.in_charge`."""
        return self.fencing.leases.in_charge

    def dismiss(self, hired: Hired) -> None:
        """See `Crew.dismiss`."""
        kill(hired.handle)

    def has_ended(self, token: str) -> bool:
        """See `Crew.has_ended`."""
        return token_has_ended(token, self._node)

    def watch(self, hired: Hired) -> None:
        """See `Crew.watch`: by a socket on this node, which tells at once, and by Ray everywhere."""
        with contextlib.suppress(Exception):
            self._facts[hired.handle] = ray.get(hired.handle.about.remote(), timeout=_OPEN_S)

        def ended(_: Any = None) -> None:
            self._ended.add(hired.handle)
            self._on_death(hired)

        hired.handle.forever.remote().future().add_done_callback(ended)
        if hired.place.node == self._node and hired.place.address is not None:
            self._watch.add(hired.place.address, ended)

    def move(self, token: str, old: Sequence[Hired], new: Sequence[Hired], cuts: Cuts, order: Load) -> list[Exception]:
        """See `Crew.move`; the arrays go from actor to actor."""
        standing = self._get({0: old[0].handle.standing.remote()}, _OPEN_S)[0]
        if isinstance(standing, Exception):
            return [standing]
        order, refs = dataclasses.replace(order, standing=standing), {}
        for hired, ranges in zip(new, cuts[1], strict=True):
            plan = copy_plan(cuts[0], ranges)
            parts = [old[copy.source].handle.part.remote(token, copy) for copy in plan]
            refs[hired.index] = hired.handle.install.remote(order, plan, *parts)
        return [answer for answer in self._get(refs, _MOVE_S).values() if isinstance(answer, Exception)]

    def ask(self, hired: Mapping[int, Hired], messages: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """See `Crew.ask`; None asks a standby how far it is."""
        answers: dict[int, Any] = {}
        for _ in range(_TRIES):  # what a supervisor says does no harm twice
            again = [i for i in messages if i in hired and (i not in answers or isinstance(answers[i], ShardUnavailable))]
            refs = {i: self._send(hired[i].handle, messages[i]) for i in again}
            answers |= self._get(refs, timeout_s, lambda refs=refs: {i for i in refs if hired[i].handle in self._ended})  # type: ignore[misc]
            if not any(isinstance(answer, ShardUnavailable) for answer in answers.values()):
                break
        return answers

    def _send(self, actor: Any, message: Any) -> Any:
        return actor.reached.remote() if message is None else actor.send.remote(message)

    def _get(self, refs: dict[int, Any], timeout_s: float, ended: Callable[[], set[int]] = set) -> dict[int, Any]:
        """Wait for answers, but not for those of processes that are known to have ended, which Ray takes seconds to tell."""
        deadline, ready = time.monotonic() + timeout_s, set()
        while refs and time.monotonic() < deadline:
            awaited = [ref for index, ref in refs.items() if index not in ended()]
            ready = set(ray.wait(awaited, num_returns=len(awaited), timeout=_SLICE_S)[0]) if awaited else set()
            if len(ready) == len(awaited):
                break
        answers: dict[int, Any] = {}
        for index, ref in refs.items():
            if ref not in ready and index in ended():
                answers[index] = ShardLost(f"shard {index}: its process ended")
                continue
            if ref not in ready:
                answers[index] = StepTimeout(f"shard {index} did not answer in {timeout_s:g} s")
                continue
            try:
                answers[index] = ray.get(ref)
            except RayTaskError as error:
                answers[index] = error.cause if isinstance(error.cause, DistNadamError) else ClusterError(str(error))
            except ActorUnavailableError as error:
                answers[index] = ShardUnavailable(f"shard {index}: {str(error).splitlines()[0]}")
            except (RayActorError, GetTimeoutError) as error:
                answers[index] = ShardLost(f"shard {index}: its process or node died: {str(error).splitlines()[0]}")
            except Exception as error:
                answers[index] = ClusterError(f"shard {index}: {type(error).__name__}: {error}")
        return answers

    def _neighbour(self, node: str, near: Sequence[Hired]) -> Address | None:
        return next((hired.place.address for hired in near if hired.place.node == node and hired.place.address is not None), None)


class SupervisorActor:
    """A `Supervisor`, its shards being this actor's children; a named one, made again by Ray, finds them by their names."""

    def __init__(self, specs: Sequence[ShardSpec], replicas: int, tools: Tools) -> None:
        context = ray.get_runtime_context()
        lasts_s = lease_s(specs[0].options.shard_timeout_s)
        self._crew = RayCrew(context.current_actor, specs[0].name, tools, self._died, lasts_s)
        self._specs = specs
        self._supervisor = Supervisor(specs, replicas, self._crew)
        self._made: list[Any] = []
        if context.was_current_actor_reconstructed:
            self._find_again()

    async def hire(self) -> list[Any]:
        """Make the shards' actors, which may not have started yet, and return them."""
        self._made = [self._crew.make(spec) for spec in self._specs]
        return self._made

    async def open(self) -> Roster:
        """Have the first shard of each node make the node's parameter memory, then the others join it."""
        nodes = [place.node for place in await asyncio.gather(*[a.place.remote() for a in self._made])]
        firsts = {node: nodes.index(node) for node in nodes}
        made = dict(zip(firsts, await asyncio.gather(*[self._made[i].open.remote(None) for i in firsts.values()]), strict=True))
        rest = {i: a.open.remote(made[nodes[i]].address) for i, a in enumerate(self._made) if i not in firsts.values()}
        joined = dict(zip(rest, await asyncio.gather(*rest.values()), strict=True))
        shards = [Hired(i, a, joined.get(i) or made[nodes[i]]) for i, a in enumerate(self._made)]
        self._supervisor.adopt(shards, {})
        return await self.roster(0)

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
        """Return what `node_facts` says here, and what was recovered from."""
        return {**node_facts(), **self._supervisor.recoveries()}

    async def specs(self) -> Sequence[ShardSpec]:
        """Return the shards' specs."""
        return self._supervisor.specs()

    async def close(self) -> None:
        """See `Supervisor.close`."""
        await asyncio.to_thread(self._supervisor.close)

    def _died(self, hired: Hired) -> None:
        self._supervisor.died(hired)

    def _find_again(self) -> None:
        """Find the living actors of this optimizer by their names, and take them over."""
        prefix, found = f"{self._specs[0].name}/", []
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
                with contextlib.suppress(ValueError):
                    found.append((entry["name"].removeprefix(prefix), ray.get_actor(entry["name"], namespace=NAMESPACE)))
        shards: dict[int, Hired] = {}
        standbys: dict[int, Hired] = {}
        for label, actor in found:
            index = int(label.split("-")[0].removesuffix("s"))
            try:
                place, standing_by = ray.get([actor.place.remote(), actor.stands_by.remote()], timeout=_FENCE_S)
            except Exception:
                kill(actor)  # dead, or silent: it is not asked again, and another takes its place
                continue
            (standbys if standing_by else shards)[index] = Hired(index, actor, place)
        missing = {i: Hired(i, None, Place("")) for i in range(len(self._specs)) if i not in shards}
        everyone = shards | missing
        for hired in (*everyone.values(), *standbys.values()):
            self._crew.fencing.inherit(hired)
        self._supervisor.adopt([everyone[i] for i in sorted(everyone)], standbys, list(missing.values()))
        threading.Thread(target=self._supervisor.begin, kwargs={"initial": None, "directory": None}, daemon=True).start()
