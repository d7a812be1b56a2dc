"""The shards as Ray actors; the only module here that says `ray.remote`. Control goes through Ray, arrays by `RayLink`.

A plain `ShardHost` is wrapped once, below. Retries are never Ray's: a call that was lost is repeated by its sender and
counted once by the shard's ledger. Ray is joined where it runs already or `RAY_ADDRESS` names it; otherwise our own is started, and
shut down at close.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from distnadam.arrays import cut_flat
from distnadam.backends.base import Backend, Link, Pending, Team
from distnadam.backends.cluster import OwnRay, actor_options, await_start, check_fits, check_versions, ensure_ray, node_facts
from distnadam.backends.host import ShardHost
from distnadam.backends.link import REMEDY, Place, RayLink, open_lanes
from distnadam.config import Options
from distnadam.errors import ArenaError, DistNadamError, LaneError, LifecycleError, NameTaken, NotRunning, ShardLost, WorkerLost
from distnadam.layout import Layout, Ranges
from distnadam.messages import Describe, Message, ShardSpec
from distnadam.transport.doorbell import Address
from distnadam.transport.lanes import LaneServer, parameter_arena

log = logging.getLogger("distnadam")

NAMESPACE = "distnadam"
_CONNECT_S = 60.0


class _ShardActor:
    """One shard in a process of its own; heavy work runs beside the event loop, so that the shard always answers."""

    def __init__(self, spec: ShardSpec) -> None:
        self._spec = spec
        self._executor = ThreadPoolExecutor(1, "shard")
        self._place = Place(ray.get_runtime_context().get_node_id())

    async def about(self) -> dict[str, str]:
        return node_facts()

    async def open(self, neighbour: Address | None) -> Place:
        """Get memory, a neighbour's where it has some to share, and begin to serve."""
        spec, arena = self._spec, None
        if spec.options.transport == "auto":
            try:
                arena = parameter_arena(spec, neighbour)
            except (ArenaError, LaneError) as error:
                self._place = dataclasses.replace(self._place, reason=f"shard {spec.index}: {error}")
        threads = spec.options.threads or max(1, int(spec.options.shard_cpus))
        first, second = (cut_flat(flat, spec.ranges) for flat in arena.flats) if arena is not None else (None, None)
        buffers = (first, second) if first is not None and second is not None else None
        self._host = ShardHost(spec, buffers=buffers, threads=threads, run=self._executor.submit)
        if arena is not None:
            self._lanes = LaneServer(spec, arena, self._host.deliver)
            self._place = dataclasses.replace(self._place, address=self._lanes.address)
        return self._place

    async def place(self) -> Place:
        return self._place

    async def send(self, message: Message) -> Any:
        return await asyncio.wrap_future(self._host.send(message))


class _Member:
    """One rank of a team."""

    def __init__(self, make: Callable[[int], Any], rank: int) -> None:
        self._member = make(rank)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._member, method)(*args)


class RayPending(Pending):
    """Object references of answers; `who` names in an error who should have given them."""

    def __init__(self, refs: dict[int, Any], who: str) -> None:
        self._refs, self._who = refs, who

    def result(self, timeout_s: float) -> dict[int, Any]:
        """See `Pending.result`."""
        _require_ray()
        try:
            return dict(zip(self._refs, ray.get(list(self._refs.values()), timeout=timeout_s), strict=True))
        except GetTimeoutError as error:
            raise TimeoutError from error
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, DistNadamError):
                raise cause from None
            raise
        except RayActorError as error:
            kind = ShardLost if self._who == "shard" else WorkerLost
            raise kind(f"{self._dead()}: its process or node died: {str(error).splitlines()[0]}") from error

    def _dead(self) -> str:
        ready, _ = ray.wait(list(self._refs.values()), num_returns=len(self._refs), timeout=0)
        dead = []
        for index, ref in self._refs.items():
            if ref in ready:
                try:
                    ray.get(ref)
                except RayActorError:
                    dead.append(str(index))
                except Exception:
                    continue
        return f"{self._who} {', '.join(dead)}"


class RayTeam(Team):
    """Actors of this driver."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors

    def call(self, method: str, *args: Any) -> Pending:
        """See `Team.call`."""
        return RayPending({rank: actor.call.remote(method, args) for rank, actor in enumerate(self._actors)}, "worker")

    def close(self) -> None:
        """See `Team.close`."""
        _kill(self._actors)


class RayBackend(Backend):
    """One actor per shard. A copy that was pickled reaches the same actors from any process of the cluster."""

    name = "ray"

    def __init__(self, actors: Sequence[Any] = (), places: Sequence[Place] = (), options: Options | None = None) -> None:
        self._actors, self.places, self._options = list(actors), list(places), options or Options()
        self._own: OwnRay | None = None
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RayBackend, (self._actors, self.places, self._options)

    @classmethod
    def connect(cls, name: str) -> tuple["RayBackend", ShardSpec]:
        """Return a backend that reaches a running named optimizer's shards, and the spec of its shard 0."""
        ensure_ray(None, start=False)
        first = cls([_named(name, 0)])
        spec: ShardSpec = first.post({0: Describe()}).result(_CONNECT_S)[0].spec
        actors = [*first._actors, *(_named(name, index) for index in range(1, spec.num_shards))]
        places = ray.get([actor.place.remote() for actor in actors], timeout=_CONNECT_S)
        return cls(actors, places, spec.options), spec

    def start(self, specs: Sequence[ShardSpec]) -> None:
        """See `Backend.start`."""
        options = self._options = specs[0].options
        self._own = ensure_ray(options)
        try:
            check_fits(options, len(specs))
            actor = ray.remote(_ShardActor)
            for spec in specs:
                self._actors.append(actor.options(**actor_options(spec, NAMESPACE)).remote(spec))
            facts = await_start([a.about.remote() for a in self._actors], options)
            check_versions(facts, node_facts())
            self.places = self._open_shards()
        except BaseException as error:
            self.close(destroy=True)
            if isinstance(error, ValueError) and "already" in str(error) and specs[0].name is not None:
                raise NameTaken(
                    f"an optimizer named {specs[0].name!r} is running on this cluster: connect to it, or choose another"
                ) from error
            raise

    def _open_shards(self) -> list[Place]:
        """Have the first shard of each node make the node's parameter memory, then the others join it."""
        nodes = [place.node for place in ray.get([a.place.remote() for a in self._actors])]
        firsts = {node: nodes.index(node) for node in nodes}
        made = dict(zip(firsts, ray.get([self._actors[i].open.remote(None) for i in firsts.values()]), strict=True))
        rest = {i: a.open.remote(made[nodes[i]].address) for i, a in enumerate(self._actors) if i not in firsts.values()}
        joined = dict(zip(rest, ray.get(list(rest.values())), strict=True))
        places = [joined.get(i) or made[node] for i, node in enumerate(nodes)]
        for reason in sorted({place.reason for place in places if place.reason}):
            log.warning("%s; %s", reason, REMEDY)
        return places

    def link(self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int) -> Link:
        """See `Backend.link`."""
        self.require_open()
        places = self.places if self._options.transport == "auto" else []
        lanes = open_lanes(ray.get_runtime_context().get_node_id(), places, layout, ranges, rank, incarnation)
        return RayLink(self, layout, lanes)

    def post(self, messages: Mapping[int, Message]) -> Pending:
        """See `Backend.post`."""
        self.require_open()
        return RayPending({index: self._actors[index].send.remote(message) for index, message in messages.items()}, "shard")

    def require_open(self) -> None:
        """Raise LifecycleError where this process has closed its handle, or shut Ray down."""
        if self._closed:
            raise LifecycleError("the optimizer was closed in this process")
        _require_ray()

    def team(self, size: int, make: Callable[[int], Any], *, cpus: float) -> Team:
        """See `Backend.team`; each member is an actor."""
        actor = ray.remote(_Member).options(num_cpus=cpus, max_restarts=0, scheduling_strategy="SPREAD")
        return RayTeam([actor.remote(make, rank) for rank in range(size)])

    def close(self, *, destroy: bool) -> None:
        """See `Backend.close`."""
        if destroy:
            _kill(self._actors)
        self._closed = True
        if self._own is not None:
            self._own.shut_down()
            self._own = None


def _require_ray() -> None:
    """Raise where Ray was shut down: its functions would quietly start another, or join one that is dying."""
    if not ray.is_initialized():
        raise LifecycleError("the Ray that this optimizer ran on was shut down in this process")


def _kill(actors: Sequence[Any]) -> None:
    if not ray.is_initialized():
        return  # they went with their Ray
    for actor in actors:
        with contextlib.suppress(Exception):  # one that is dead already
            ray.kill(actor)


def _named(name: str, index: int) -> Any:
    try:
        return ray.get_actor(f"{name}/{index}", namespace=NAMESPACE)
    except ValueError as error:
        raise NotRunning(f"no optimizer named {name!r} is running on this Ray cluster (its shard {index} was not found)") from error
