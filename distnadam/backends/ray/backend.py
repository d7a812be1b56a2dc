"""The shards on a Ray nodes, as their clients reach them. Control goes through Ray, arrays by
`RayWorkerChannel`; the actors are in `actors`.

Ray is joined where it runs already or `RAY_ADDRESS` names it; otherwise our own is started, and
shut down at close.
"""

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from distnadam.backends.base import Backend, Pending, WorkerChannel, WorkerGroup
from distnadam.backends.ray import calls, processes, registry
from distnadam.backends.ray.actors import make_supervisor
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.calls import RayPending, own, require_ray, retry_until_answered
from distnadam.backends.ray.metrics_exporter import Exporter
from distnadam.backends.ray.names import end_optimizer, is_named, named
from distnadam.backends.ray.nodes import await_start, check_versions, node_facts
from distnadam.backends.ray.placement import check_fits
from distnadam.backends.ray.session import OwnedRay, connect_or_start
from distnadam.backends.ray.worker_channel import REMEDY, RayWorkerChannel
from distnadam.backends.ray.worker_group import RayWorkerGroup
from distnadam.config import Options
from distnadam.errors import (
    ClusterError,
    LifecycleError,
    NameTaken,
    NotRunning,
    Reconfigured,
    StepTimeout,
    Unrecoverable,
)
from distnadam.metrics.meter import Meter
from distnadam.protocol.messages import Message, Resume, ShardSpec
from distnadam.protocol.supervisor_messages import Order
from distnadam.supervision.shard_map import ShardMap, require_alive
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Layout, Ranges

log = logging.getLogger("distnadam")

_CONNECT_S = 60.0
_RETRY_S = 0.2
_OPEN_S = 600.0
_RESHARD_S = 3600.0


class RayBackend(Backend):
    """One actor per shard, and a supervisor. A copy that was pickled reaches the same actors from
    any process of the cluster.
    """

    name = "ray"
    token = staticmethod(processes.process_token)

    def __init__(
        self,
        supervisor: Any = None,
        name: str | None = None,
        shard_map: ShardMap | None = None,
        options: Options | None = None,
    ) -> None:
        self._supervisor, self._name, self._options = supervisor, name, options or Options()
        self._shard_map = shard_map or ShardMap(0, ())
        self._own: OwnedRay | None = None
        self._run: str | None = None
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RayBackend, (self._supervisor, self._name, self._shard_map, self._options)

    @property
    def actors(self) -> list[Any]:
        """The shards' actors, in order."""
        return [process.handle for process in self._shard_map.shards]

    @property
    def places(self) -> list[ProcessAddress]:
        """Where the shards are, in order."""
        return [process.place for process in self._shard_map.shards]

    @property
    def meter(self) -> Meter | None:
        """See `Backend.meter`."""
        return self._exporter.meter if self._exporter is not None else None

    @cached_property
    def _exporter(self) -> Exporter | None:
        exporter = Exporter.start(self._name, self._options)
        if exporter is not None:
            weakref.finalize(
                self, exporter.finish
            )  # who got this handle with a task may never close it
        return exporter

    @classmethod
    def connect(cls, name: str) -> tuple["RayBackend", ShardSpec]:
        """Return a backend that reaches a running named optimizer's shards, and the spec of its
        shard 0.
        """
        connect_or_start(None, start=False)
        backend = cls(named(name), name)
        spec: ShardSpec = backend._call("specs", timeout_s=_CONNECT_S)[0]
        backend._options = spec.options
        backend._shard_map = require_alive(backend._call("shard_map", 0, timeout_s=_CONNECT_S))
        return backend, spec

    @classmethod
    def stop(cls, name: str) -> None:
        """End a running named optimizer, or what is left of one, from any process; raise NotRunning
        where there is nothing of it.
        """
        connect_or_start(None, start=False)
        run = registry.runs_of(name)
        try:
            supervisor = named(name)
        except NotRunning:
            if not registry.actors_of(run):
                raise
            supervisor = None
        end_optimizer(supervisor, run)

    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """See `Backend.start`."""
        options = self._options = specs[0].options
        self._name = specs[0].name
        self._own = connect_or_start(options)
        try:
            Exporter.check(options)
            check_fits(options, len(specs) * (1 + replicas))
            self._start(specs, replicas)
        except BaseException as error:
            self.close(destroy=True)
            if isinstance(error, ValueError) and "already" in str(error) and self._name is not None:
                raise NameTaken(
                    f"an optimizer named {self._name!r} is running on this cluster: connect to it, "
                    "or choose another"
                ) from error
            if isinstance(error, RayError):
                line = (
                    -1 if isinstance(error, RayTaskError) else 0
                )  # the end of a traceback, the beginning of a letter
                raise ClusterError(
                    f"the optimizer could not be started: {str(error).strip().splitlines()[line]}"
                ) from error
            raise
        for reason in sorted({place.reason for place in self.places if place.reason}):
            log.warning("%s; %s", reason, REMEDY)

    def _start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """Make the supervisor and the shards; every call may be lost and is made again."""
        run, options = registry.new_run(self._name), self._options
        self._supervisor = make_supervisor([replace(spec, run_id=run) for spec in specs], replicas)
        self._run = run  # from here on there is something to end
        await_start([self._supervisor], options)
        actors = retry_until_answered(self._supervisor.start.remote, timeout_s=_CONNECT_S)
        check_versions(await_start(actors, options), node_facts())
        self._shard_map = retry_until_answered(self._supervisor.open.remote, timeout_s=_OPEN_S)

    def began(self, *, initial: Flat | None, directory: str | None) -> None:
        """See `Backend.began`."""
        given = (
            []
            if initial is None or not self._options.retain_initial
            else [initial[space] for space in sorted(initial)]
        )
        self._call("begin", directory, *given, timeout_s=_CONNECT_S)

    def link(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        """See `Backend.link`."""
        self.require_open()
        node, lanes = ray.get_runtime_context().get_node_id(), self._options.transport == "auto"
        return RayWorkerChannel(
            self, lambda: self.places if lanes else [], layout, ranges, node, rank, incarnation
        )

    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        """See `Backend.post`."""
        self.require_open()
        shards = self._shard_map.shards
        if any(index >= len(shards) for index in messages):
            raise Reconfigured(f"there are {len(shards)} shards now; look again")
        if messages and all(isinstance(message, Resume) for message in messages.values()):
            for (
                index,
                message,
            ) in messages.items():  # one that is lost would hold the shard until a timeout
                calls.retry_in_background(partial(shards[index].handle.send.remote, message))
            return RayPending({}, "shard")
        return RayPending(
            {
                index: shards[index].handle.send.remote(message)
                for index, message in messages.items()
            },
            "shard",
        )

    def await_recovery(self, timeout_s: float) -> None:
        """See `Backend.await_recovery`."""
        self._shard_map = require_alive(
            self._call("shard_map", self._shard_map.version, suspect=True, timeout_s=timeout_s)
        )

    def refresh(self) -> None:
        """See `Backend.refresh`."""
        self._shard_map = require_alive(self._call("shard_map", 0, timeout_s=_CONNECT_S))

    def hosts(self) -> list[str]:
        """See `Backend.hosts`."""
        return _in_words([place.node for place in self.places])

    def standbys(self) -> dict[int, str]:
        """See `Backend.standbys`."""
        nodes: dict[int, str] = self._call("about", timeout_s=_CONNECT_S)["standbys"]
        return dict(zip(nodes, _in_words(nodes.values()), strict=True))

    @property
    def num_shards(self) -> int:
        """See `Backend.num_shards`."""
        return len(self._shard_map.shards)

    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """See `Backend.reshard`."""
        self._call("reshard", num_shards, cuts, timeout_s=_RESHARD_S)
        self.refresh()

    @property
    def version(self) -> int:
        """See `Backend.version`."""
        return self._shard_map.version

    def wait_if_moved(self, version: int) -> bool:
        """See `Backend.wait_if_moved`."""
        self.await_recovery(self._options.step_timeout_s)
        return self._shard_map.version > version

    def report_cannot_complete(self) -> None:
        """See `Backend.report_cannot_complete`."""
        self._call("notice", "stuck", -1, 0, timeout_s=_CONNECT_S)

    def changing(self, what: str) -> None:
        """See `Backend.changing`."""
        self._call("changing", what, timeout_s=_CONNECT_S)

    def changes(self) -> int:
        """See `Backend.changes`."""
        number: int = self._call("changes", timeout_s=_CONNECT_S)
        return number

    def saved(self, root: str, changes: int) -> None:
        """See `Backend.saved`."""
        self._call("saved", root, changes, timeout_s=_CONNECT_S)

    def lost_ranks(self) -> dict[int, int]:
        """See `Backend.lost_ranks`."""
        lost: dict[int, int] = self._call("lost_ranks", timeout_s=_CONNECT_S)
        return lost

    def require_open(self) -> None:
        """Raise LifecycleError where this process has closed its handle, or shut Ray down."""
        if self._closed:
            raise LifecycleError("the optimizer was closed in this process")
        require_ray()

    def team(self, size: int, make: Callable[[int], Any], options: Options) -> WorkerGroup:
        """See `Backend.team`; each member is an actor."""
        return RayWorkerGroup(size, make, options)

    def close(self, *, destroy: bool) -> None:
        """See `Backend.close`; a handle that did not make the shards ends those of its name."""
        if destroy and self._supervisor is not None and ray.is_initialized():
            end_optimizer(
                self._supervisor,
                self._run or (registry.runs_of(self._name) if self._name else None),
            )
        self._closed = True
        if (exporter := self.__dict__.get("_exporter")) is not None:
            exporter.close()
        if self._own is not None:
            self._own.shut_down()
            self._own = None

    def _call(self, method: str, *args: Any, timeout_s: float, **how: Any) -> Any:
        """Ask the supervisor; a named one that died is waited for, since Ray makes it again."""
        self.require_open()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(
                    getattr(self._supervisor, method).remote(*args, **how),
                    timeout=max(0.0, deadline - time.monotonic()),
                )
            except GetTimeoutError as error:
                raise StepTimeout(
                    f"the optimizer's supervisor did not answer {method} in {timeout_s:g} s"
                ) from error
            except RayTaskError as error:
                raise own(error) from None
            except RayActorError as error:
                lives = isinstance(
                    error, ActorUnavailableError
                )  # the call may have been carried out, which does no harm twice
                if not lives and self._name and not is_named(self._supervisor, self._name):
                    told = (
                        f"the optimizer {self._name!r} was ended by another process: by "
                        "`distnadam stop`, or by its creator"
                    )
                    raise LifecycleError(told) from error
                if not (lives or self._name) or time.monotonic() >= deadline:
                    told = (
                        "the optimizer's supervisor died, and its shards with it: restore "
                        "from a checkpoint, or give the optimizer a name"
                    )
                    raise Unrecoverable(told) from error
                time.sleep(_RETRY_S)


def _in_words(nodes: Iterable[str]) -> list[str]:
    """Return the address of each of Ray's nodes, with the beginning of what Ray calls it."""
    addresses = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}
    return [f"{addresses.get(node, 'a node that is gone')} ({node[:8]})" for node in nodes]
