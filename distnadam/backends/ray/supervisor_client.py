"""Calls to the supervisor's actor, one typed method each.

Every call may be repeated, and is repeated while Ray loses it. Only this module knows the names of
the actor's methods.
"""

from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from distnadam.backends.base import SupervisorClient
from distnadam.backends.ray.address import ProcessAddress
from distnadam.backends.ray.calls import Callee, retry_until_answered
from distnadam.backends.ray.joined import require_ray, while_ray_lives
from distnadam.backends.ray.orphans import is_named
from distnadam.backends.ray.relays import RelayProcess
from distnadam.backends.ray.supervisor_actor import SupervisorStatus
from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.errors import ClusterError, LifecycleError, Unrecoverable
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_events import CannotComplete
from distnadam.supervision.shard_map import ShardMap
from distnadam.tensors.arrays import Flat
from distnadam.tensors.layout import Ranges

_ANSWER_S = 60.0
_OPEN_S = 600.0
_RELAY_S = 120.0
_RESHARD_S = 3600.0
_STARTING = Callee(
    who="the optimizer's supervisor",
    died=ClusterError,
    unavailable=ClusterError,
)


class RaySupervisorClient(SupervisorClient):
    """The supervisor's actor, as one process calls it; `closed` once this process released it.

    Args:
        actor: its handle.
        name: the optimizer's name, under which Ray restarts the actor; None without one.
        retain_initial: whether the supervisor wants the first parameters.
    """

    def __init__(self, actor: Any, name: str | None, *, retain_initial: bool = True) -> None:
        self.actor = actor
        self._name = name
        self._retain_initial = retain_initial
        self.closed = False

    def detach(self) -> None:
        """Refuse every later call of this process."""
        self.closed = True

    def require_open(self) -> None:
        """Raise LifecycleError if this process closed its handle or shut Ray down.

        Raises:
            RayLost: Ray itself died.
        """
        if self.closed:
            raise LifecycleError("the optimizer was closed in this process")
        require_ray()

    def start_shards(self) -> list[Any]:
        """Create the shards' actors and return their handles; they may not have started yet."""
        handles: list[Any] = retry_until_answered(
            self.actor.start.remote, timeout_s=_ANSWER_S, callee=_STARTING
        )
        return handles

    def open_shards(self) -> ShardMap:
        """Have the started shards get their memory and serve; return where they are."""
        shard_map: ShardMap = retry_until_answered(
            self.actor.open.remote, timeout_s=_OPEN_S, callee=_STARTING
        )
        return shard_map

    def specs(self) -> list[ShardSpec]:
        """Return the shards' specs."""
        specs: list[ShardSpec] = self._ask("specs", self.actor.specs.remote)
        return specs

    def shard_map(self) -> ShardMap:
        """Return where the shards are."""
        shard_map: ShardMap = self._ask("shard_map", lambda: self.actor.shard_map.remote(0))
        return shard_map

    def recovered_shard_map(self, newer_than: int, *, timeout_s: float) -> ShardMap:
        """Return a map newer than that version, or the present one once all shards were checked."""
        shard_map: ShardMap = self._ask(
            "shard_map",
            lambda: self.actor.shard_map.remote(newer_than, suspect=True),
            timeout_s=timeout_s,
        )
        return shard_map

    def relay(self, node: str, gone: ProcessAddress | None) -> RelayProcess:
        """Return the relay of a node; not the one of that address, which the caller knows to have
        ended.

        Raises:
            LaneError: none can be started there.
        """
        relay: RelayProcess = self._ask(
            "relay", lambda: self.actor.relay.remote(node, gone), timeout_s=_RELAY_S
        )
        return relay

    def standby_nodes(self) -> dict[int, str]:
        """Return the Ray node of each standby by its shard's index."""
        return {index: address.node for index, address in self.status().standbys.items()}

    def status(self) -> SupervisorStatus:
        """Return where the supervisor has all processes, and what it has recovered from."""
        status: SupervisorStatus = self._ask("status", self.actor.status.remote)
        return status

    def about(self) -> dict[str, str]:
        """Return the node, process id and package versions of the supervisor that answers now."""
        facts: dict[str, str] = self._ask("about", self.actor.about.remote)
        return facts

    @override
    def started(self, *, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        arrays: list[Any] = []
        if initial is not None and self._retain_initial:
            arrays = [initial[space] for space in sorted(initial)]
        self._ask("begin", lambda: self.actor.begin.remote(checkpoint, *arrays))

    @override
    def report_cannot_complete(self) -> None:
        self._ask("notify", lambda: self.actor.notify.remote(CannotComplete()))

    @override
    def replacement_begun(self, what: str) -> int:
        begun: int = self._ask(
            "replacement_begun", lambda: self.actor.replacement_begun.remote(what)
        )
        return begun

    @override
    def replacement_completed(self, begun: int) -> None:
        self._ask("replacement_completed", lambda: self.actor.replacement_completed.remote(begun))

    @override
    def snapshot_taken(self) -> int:
        taken: int = self._ask("snapshot_taken", self.actor.snapshot_taken.remote)
        return taken

    @override
    def checkpoint_written(self, checkpoint: CheckpointId, taken: int, *, is_whole: bool) -> None:
        self._ask(
            "checkpoint_written",
            lambda: self.actor.checkpoint_written.remote(checkpoint, taken, is_whole=is_whole),
        )

    @override
    def lost_ranks(self) -> dict[int, int]:
        lost: dict[int, int] = self._ask("lost_ranks", self.actor.lost_ranks.remote)
        return lost

    @override
    def shard_recoveries(self) -> int:
        return self.status().shard_recoveries

    @override
    def reshard(self, cuts: Sequence[Ranges]) -> None:
        self._ask("reshard", lambda: self.actor.reshard.remote(cuts), timeout_s=_RESHARD_S)

    def _ask(self, what: str, call: Callable[[], Any], *, timeout_s: float = _ANSWER_S) -> Any:
        """Return the answer; wait for a named supervisor that died, since Ray restarts it."""
        self.require_open()
        callee = Callee(
            who=f"the optimizer's supervisor ({what})",
            died=Unrecoverable,
            unavailable=Unrecoverable,
            remedy="; its shards died with it: restore from a checkpoint, or give the optimizer "
            "a name",
            restarts=self._restarts,
        )
        with while_ray_lives():
            return retry_until_answered(call, timeout_s=timeout_s, callee=callee)

    def _restarts(self) -> bool:
        """Whether Ray restarts the supervisor; raise LifecycleError if another process ended it."""
        if self._name is not None and not is_named(self.actor, self._name):
            raise LifecycleError(
                f"the optimizer {self._name!r} was ended by another process: by "
                "`distnadam stop`, by its creator, or with it"
            )
        return self._name is not None
