"""What runs in Ray actors: a shard or its standby, the supervisor, one rank of `fit`. The only module that says `ray.remote`.

Plain classes, wrapped once at the end. Retries are never Ray's: a call that was lost is repeated by its sender and counted once by the
shard's ledger. No actor is restarted by Ray but a named optimizer's supervisor.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from distnadam.arrays import Flat, cut_flat, empty_flat
from distnadam.backends.cluster import actor_options, node_facts, process_born
from distnadam.backends.host import ShardHost
from distnadam.backends.link import Place
from distnadam.backends.standby import Standby
from distnadam.errors import ArenaError, ClusterError, DistNadamError, LaneError, ShardLost, StepTimeout
from distnadam.messages import Message, ShardSpec
from distnadam.orders import Order, Reign, Replicated, Standing
from distnadam.supervisor import Crew, Hired, Roster, Supervisor
from distnadam.transitions import Notice
from distnadam.transport.arena import Arena
from distnadam.transport.doorbell import Address, Watch
from distnadam.transport.lanes import LaneServer, parameter_arena
from distnadam.transport.replica import LaneFollower, LaneReplica, Record, Replica

NAMESPACE = "distnadam"
_OPEN_S = 120.0
_DRAIN_S = 10.0
_FENCE_S = 5.0
_SLICE_S = 0.05


class ShardActor:
    """One shard, or its standby, in a process of its own; heavy work runs beside the event loop, so that it always answers."""

    def __init__(self, spec: ShardSpec, supervisor: Any) -> None:
        self._spec, self._supervisor = spec, supervisor
        self._executor = ThreadPoolExecutor(1, "shard")
        self._place = Place(ray.get_runtime_context().get_node_id())
        self._threads = spec.options.threads or max(1, int(spec.options.shard_cpus))
        self._arena: Arena | None = None
        self._host: ShardHost | None = None
        self._standby: Standby | None = None
        self._follower: LaneFollower | None = None

    async def about(self) -> dict[str, str]:
        return node_facts()

    async def open(self, neighbour: Address | None, *, standby: bool = False) -> Place:
        """Get memory, a neighbour's where it has some to share, and begin to serve, or to follow."""
        if standby:
            self._standby = Standby(self._spec, self._threads)
            sizes = {space: end - begin for space, (begin, end) in self._spec.ranges.items()}
            self._follower = LaneFollower(sizes, self._standby.take_arrays, self._standby.apply)
            self._place = dataclasses.replace(self._place, address=self._follower.address)
            if neighbour is not None:
                self._share_memory(neighbour)
            return self._place
        self._share_memory(neighbour)
        self._host = self._make_host(self._spec)
        self._serve(self._host)
        return self._place

    async def place(self) -> Place:
        return self._place

    async def stands_by(self) -> bool:
        return self._host is None

    async def send(self, message: Message | Order) -> Any:
        if self._host is None:
            raise ClusterError(f"shard {self._spec.index}: this process is a standby")
        return await asyncio.wrap_future(self._host.send(message))

    async def forever(self) -> None:
        """Never return, so that the call's end tells that this process ended."""
        await asyncio.Event().wait()

    async def begin(self, standing: Standing, config: Any, *arrays: Any) -> None:
        """Standby: take the place in time of the arrays; those come here where the primary is on another node."""
        assert self._standby is not None
        if arrays:
            spaces = sorted(self._spec.ranges)
            named = [dict(zip(spaces, arrays[i::3], strict=True)) for i in range(3)]
            copied = [{space: values.copy() for space, values in flat.items()} for flat in named]
            self._standby.take_arrays(dict(zip(("params", "m", "v"), copied, strict=True)))
        self._standby.begin(standing, config)

    async def replicate(self, record: Record, *means: Any) -> int:
        """Standby: take a record from a primary on another node."""
        assert self._standby is not None
        standby, mean = self._standby, dict(zip(sorted(self._spec.ranges), means, strict=True)) if means else {}
        await asyncio.wrap_future(self._executor.submit(standby.apply, record, mean))
        return record.round if isinstance(record, Replicated) else -1

    async def reached(self) -> int | None:
        """Standby: the round that it has reached, once all that a dead primary sent is applied."""
        if self._standby is None:
            return None
        if self._follower is not None:
            await asyncio.to_thread(self._follower.ended.wait, _DRAIN_S)
        return self._standby.status()["round"]

    async def promote(self, reign: Reign, neighbour: Address | None) -> Place:
        """Standby: become the shard."""
        assert self._standby is not None
        if self._arena is None or neighbour is not None:
            self._share_memory(neighbour)
        standby, self._standby = self._standby, None
        self._host, _ = standby.promote(reign, self._make_host)
        self._serve(self._host)  # the follower's socket stays, for who watches it
        return self._place

    def _share_memory(self, neighbour: Address | None) -> None:
        self._place = dataclasses.replace(self._place, reason=None)
        if self._spec.options.transport != "auto":
            return
        try:
            self._arena = parameter_arena(self._spec, neighbour)
        except (ArenaError, LaneError) as error:
            self._place = dataclasses.replace(self._place, reason=f"shard {self._spec.index}: {error}")

    def _make_host(self, spec: ShardSpec) -> ShardHost:
        buffers = None
        if self._arena is not None:
            first, second = (cut_flat(flat, spec.ranges) for flat in self._arena.flats)
            buffers = (first, second)
        how = {"threads": self._threads, "run": self._executor.submit, "on_notice": self._notice, "attach": self._attach}
        return ShardHost(spec, buffers=buffers, **how)  # type: ignore[arg-type]

    def _serve(self, host: ShardHost) -> None:
        if self._arena is None:
            self._place = dataclasses.replace(self._place, address=None)
            return
        lanes = LaneServer(self._spec, self._arena, host.deliver)
        host.find_slot = lanes.slot
        self._place = dataclasses.replace(self._place, address=lanes.address)

    def _notice(self, notice: Notice) -> None:
        self._supervisor.notice.remote(self._spec.index, notice.what, notice.rank, notice.incarnation)

    def _attach(self, standby: Hired, standing: Standing, config: Any, arrays: dict[str, Flat]) -> Replica:
        """Copy the state to a standby; between processes of one node by memory, else by objects."""
        timeout_s = self._spec.options.shard_timeout_s
        if standby.place.node == self._place.node and standby.place.address is not None:
            replica: Replica = LaneReplica(standby.place.address, arrays, standing.round, timeout_s)
            ray.get(standby.handle.begin.remote(standing, config), timeout=timeout_s)
            return replica
        return CallReplica(standby.handle, standing, config, arrays, timeout_s)


class CallReplica(Replica):
    """A standby on another node: what it is given travels by Ray objects, and counts once it has answered.

    While the first copy is on its way, rounds go on without waiting for it.
    """

    def __init__(self, standby: Any, standing: Standing, config: Any, arrays: dict[str, Flat], timeout_s: float) -> None:
        self._standby, self._timeout_s = standby, timeout_s
        self._spaces = sorted(arrays["params"])
        self.mean = empty_flat({space: values.size for space, values in arrays["params"].items()})
        given = [arrays[name][space] for space in self._spaces for name in ("params", "m", "v")]
        self._calls = [standby.begin.remote(standing, config, *given)]
        self.reached, self._synced = standing.round, False

    def ready(self) -> bool:
        """See `Replica.ready`; a call has copied its arguments."""
        return True

    def send(self, record: Record) -> bool:
        """See `Replica.send`."""
        means = [self.mean[space] for space in self._spaces] if isinstance(record, Replicated) and record.outcome == "applied" else []
        self._calls.append(self._standby.replicate.remote(record, *means))
        try:
            if self._synced:
                ray.get(self._calls, timeout=self._timeout_s)
                self._calls = []
            else:
                done, self._calls = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
                ray.get(done)
                self._synced = not self._calls
        except Exception:  # whatever it is, that standby cannot follow
            return False
        if isinstance(record, Replicated):
            self.reached = record.round
        return True

    def close(self) -> None:
        """See `Replica.close`."""


class RayCrew(Crew):
    """Processes as Ray actors.

    Args:
        supervisor: the supervisor's own actor, which shards tell what happens.
        name: the optimizer's, where it outlives who made it.
        on_death: told which process ended.
    """

    def __init__(self, supervisor: Any, name: str | None, on_death: Callable[[Hired], None]) -> None:
        self._supervisor, self._name, self._on_death = supervisor, name, on_death
        self._node = ray.get_runtime_context().get_node_id()
        self._watch = Watch()
        self._ended: set[Any] = set()
        self._facts: dict[Any, dict[str, str]] = {}

    def make(self, spec: ShardSpec, *, standby: bool = False) -> Any:
        """Return a new actor, which may not have started yet."""
        label = f"{spec.name}/{spec.index}{'s' if standby else ''}-{os.urandom(4).hex()}" if spec.name is not None else None
        return make_shard(spec, self._supervisor, label)

    def hire(self, spec: ShardSpec, *, standby: bool, near: Sequence[Hired]) -> Hired:
        """See `Crew.hire`."""
        actor = self.make(spec, standby=standby)
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
        """See `Crew.fence`: SIGKILL by a process of its own node, since one that is stopped does not obey Ray."""
        facts = self._facts.get(hired.handle)
        if facts is not None:
            where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(hired.place.node, soft=False)
            if hired.place.node == self._node:
                end_process(int(facts["pid"]), facts["born"])
            else:
                with contextlib.suppress(Exception):  # the node is gone, with all that ran there
                    killer = remote_end_process.options(num_cpus=0, scheduling_strategy=where, max_retries=0)
                    ray.get(killer.remote(int(facts["pid"]), facts["born"]), timeout=_FENCE_S)
        kill(hired.handle)

    def dismiss(self, hired: Hired) -> None:
        """See `Crew.dismiss`."""
        kill(hired.handle)

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

    def ask(self, hired: Mapping[int, Hired], messages: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """See `Crew.ask`; None asks a standby how far it is."""
        refs = {
            index: hired[index].handle.reached.remote() if message is None else hired[index].handle.send.remote(message)
            for index, message in messages.items()
            if index in hired
        }
        return self._get(refs, timeout_s, lambda: {index for index in refs if hired[index].handle in self._ended})

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
            except (RayActorError, GetTimeoutError) as error:
                answers[index] = ShardLost(f"shard {index}: its process or node died: {str(error).splitlines()[0]}")
            except Exception as error:
                answers[index] = ClusterError(f"shard {index}: {type(error).__name__}: {error}")
        return answers

    def _neighbour(self, node: str, near: Sequence[Hired]) -> Address | None:
        return next((hired.place.address for hired in near if hired.place.node == node and hired.place.address is not None), None)


class SupervisorActor:
    """A `Supervisor` in a process of its own, with the shards as its children; a named one, made again by Ray, finds them by their names."""

    def __init__(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        context = ray.get_runtime_context()
        self._crew = RayCrew(context.current_actor, specs[0].name, self._died)
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
        spaces = sorted(self._specs[0].layout.sizes)
        flat = dict(zip(spaces, initial, strict=True)) if initial else None
        await asyncio.to_thread(lambda: self._supervisor.begin(initial=flat, directory=directory))

    async def roster(self, newer_than: int, *, suspect: bool = False) -> Roster:
        return await asyncio.wrap_future(self._supervisor.roster(newer_than, suspect))

    async def notice(self, index: int, what: str, rank: int, incarnation: int) -> None:
        self._supervisor.notice(index, what, rank, incarnation)

    async def changing(self, what: str) -> None:
        self._supervisor.changing(what)

    async def saved(self, root: str) -> None:
        self._supervisor.saved(root)

    async def lost_ranks(self) -> dict[int, int]:
        return self._supervisor.lost_ranks()

    async def about(self) -> dict[str, Any]:
        return {**node_facts(), **dataclasses.asdict(self._supervisor.recoveries)}

    async def specs(self) -> Sequence[ShardSpec]:
        return self._specs

    async def close(self) -> None:
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
                continue
            (standbys if standing_by else shards)[index] = Hired(index, actor, place)
        missing = {i: Hired(i, None, Place("")) for i in range(len(self._specs)) if i not in shards}
        everyone = shards | missing
        self._supervisor.adopt([everyone[i] for i in sorted(everyone)], standbys)
        threading.Thread(target=self._supervisor.begin, kwargs={"initial": None, "directory": None}, daemon=True).start()


class Member:
    """One rank of a team, which a thread of its own runs, so that it can be asked about meanwhile."""

    def __init__(self, make: Callable[[int], Any], rank: int) -> None:
        self._member = make(rank)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._member, method)(*args)


def end_process(pid: int, born: str) -> None:
    """Kill a process of this node, if it is still the one that was born then, and wait until it is gone."""
    with contextlib.suppress(OSError):
        if process_born(pid) == born:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _FENCE_S
        while process_born(pid) == born and time.monotonic() < deadline:
            time.sleep(0.001)


def kill(actor: Any) -> None:
    """End an actor, if it is there."""
    if actor is not None and ray.is_initialized():
        with contextlib.suppress(Exception):  # one that is dead already
            ray.kill(actor)


_shard, _supervisor, _member = ray.remote(ShardActor), ray.remote(SupervisorActor), ray.remote(Member)
remote_end_process = ray.remote(end_process)


def make_shard(spec: ShardSpec, supervisor: Any, label: str | None) -> Any:
    """Return a new actor for a shard or its standby, to be opened."""
    return _shard.options(**actor_options(spec, label, NAMESPACE)).remote(spec, supervisor)


def make_supervisor(specs: Sequence[ShardSpec], replicas: int) -> Any:
    """Return a new supervisor; a named one outlives who made it, and is made again by Ray where it dies."""
    asked: dict[str, Any] = {"num_cpus": 0, "max_task_retries": 0}
    if specs[0].name is not None:
        asked |= {"name": specs[0].name, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1}
    return _supervisor.options(**asked).remote(specs, replicas)


def make_member(make: Callable[[int], Any], rank: int, cpus: float) -> Any:
    """Return a new actor for one rank of a team."""
    return _member.options(num_cpus=cpus, max_restarts=0, scheduling_strategy="SPREAD").remote(make, rank)
