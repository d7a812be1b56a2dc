"""The seam between an optimizer's clients and the place where its shards live.

Clients see a `Backend` and cannot tell whether the shards are objects of this process, Ray actors,
or a simulation. It has two parts: `ShardTransport` reaches the shards, `SupervisorClient` reaches
what watches over them. The protocol's messages pass through it; nothing here knows what they do, a
process or Ray.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.config import Options
from distnadam.metrics.meter import Meter
from distnadam.protocol.messages import (
    Message,
    Pull,
    Push,
    PushSlice,
    RoundResult,
    ShardSpec,
    Step,
    TotalNorms,
)
from distnadam.protocol.round_settings import RoundSettings
from distnadam.protocol.supervisor_messages import Order
from distnadam.tensors.arrays import Array, Flat
from distnadam.tensors.layout import Layout, Ranges


class Pending(ABC):
    """Answers on their way."""

    @abstractmethod
    def result(self, timeout_s: float) -> dict[int, Any]:
        """Return every shard's answer by index.

        Raises:
            DistNadamError: what the first shard that refused raised.
            ShardLost: a shard died.
            TimeoutError: not all answered in time; may be called again.
        """


class Refused(Pending):
    """The answer of a shard that raised at once."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @override
    def result(self, timeout_s: float) -> dict[int, Any]:
        raise self._error


@dataclass(frozen=True, eq=False)
class Routes:
    """How a worker reaches each shard.

    Attributes:
        ranges: what each shard holds.
        shared: the shards that share memory with the worker.
        objects: those reached by Ray's objects; the others, by TCP, count the bytes themselves.
    """

    ranges: list[Ranges]
    shared: frozenset[int]
    objects: frozenset[int]


class WorkerChannel(ABC):
    """One worker's connection to all shards.

    `parameters` are both buffers of the whole model's parameters if the worker shares them with
    every shard; if None, answers carry the parameters. `relayed` are the shards whose parameters
    are in that memory only once an answer has come by this channel. `routes` is a new object
    whenever a shard is reached in another way; None if bytes never move. `written_here` is as of
    `ShardTransport`: if not None, `step_at_once` takes gradients from anywhere, apart from that.
    """

    parameters: tuple[Flat, Flat] | None = None
    relayed: frozenset[int] = frozenset()
    routes: Routes | None = None
    written_here: Sequence[Array] | None = None

    @property
    @abstractmethod
    def gradients(self) -> Flat:
        """The memory that the worker writes its gradients into, always the same."""

    @abstractmethod
    def post(
        self, messages: Mapping[int, Push] | Mapping[int, TotalNorms] | Mapping[int, Pull]
    ) -> Pending:
        """Send each shard its message without waiting.

        A push's gradients are views of `gradients`.

        Raises:
            ShardLost: a connection has ended since `reconnect`.
        """

    def post_push(self, push: Push, parts: Sequence[Flat], slices: Mapping[int, int]) -> Pending:
        """Send every shard a push with its part of the gradients, unless they are rejected, and how
        many slices it was sent ahead of it; as `post` does.
        """
        rejected = push.rejection is not None
        return self.post(
            {
                index: replace(
                    push, gradients=None if rejected else part, slices=slices.get(index, 0)
                )
                for index, part in enumerate(parts)
            }
        )

    def step_at_once(
        self,
        epoch: int,
        rank: int,
        incarnation: int,
        round: int,
        parts: Sequence[Flat],
        settings: RoundSettings,
    ) -> RoundResult | Pending | None:
        """Send every shard a push of an ordinary round, and return that round's end if it comes
        soon, or the awaited answers; or None: the push must be posted then, and counts once.
        Raises what a shard's step raises, and what an answer does.
        """
        return None

    def send_ahead(self, shard: int, part: PushSlice) -> bool:
        """Send a part of a push before the push; return whether its number counts in that.

        The elements must stay as they are until the push is answered.
        """
        return False

    @abstractmethod
    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        """Connect to the shards where they are now, as that incarnation of the worker.

        `ranges` is what each shard holds now. `gradients` stays the same memory.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the connections; views of the memory stay valid."""


class WorkerGroup(ABC):
    """One object per rank, each in a thread or process of its own, called by a method's name."""

    @abstractmethod
    def call(self, rank: int, method: str, *args: Any) -> None:
        """Call a method of one member without waiting."""

    @abstractmethod
    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        """Wait up to `timeout_s` for a call to end; return (rank, value or error) of each ended."""

    @abstractmethod
    def hosts(self) -> dict[int, str]:
        """Return where each member runs, in words, as far as it is known."""

    def to_leave(self) -> frozenset[int]:
        """Return the ranks whose host is to be left, if there is another to go to."""
        return frozenset()

    @abstractmethod
    def end(self, rank: int) -> None:
        """Make certain that a member's process, if it has one, is gone, and drop its call."""

    @abstractmethod
    def start(self, rank: int) -> None:
        """Start a new member in place of one that was ended."""

    @abstractmethod
    def close(self) -> None:
        """End all members; call this once no member waits for a shard any more."""


class ShardTransport(ABC):
    """Sends messages to the shards, at the addresses that this process knows."""

    @property
    @abstractmethod
    def cuts(self) -> Sequence[Ranges]:
        """The ranges that each shard holds; the same object until this process learns more."""

    @property
    @abstractmethod
    def version(self) -> int:
        """A number that grows when this process learns that shards moved or went back."""

    @property
    def written_here(self) -> Sequence[Array] | None:
        """The parameters that this process's code can have views of, if shards read its memory."""
        return None

    def unseen(self) -> AbstractContextManager[bool]:
        """Say whether nobody can have a view of the present parameters; nobody gets one inside."""
        return nullcontext(False)

    def share_parameters(self) -> Sequence[Array]:
        """Have who has views of the parameters write them too, before a worker opens a channel, so
        that shards step them there; return their memory, none where shards are elsewhere.
        """
        return []

    def move_parameters(self) -> None:
        """Leave shared parameters to whoever has views of them, as they are, and step copies of
        them; not while a round is in progress.
        """
        return

    def await_work(self) -> None:
        """Wait until no shard reads what was given to it, if it reads this process's memory.

        A second interrupt ends the wait, and so does the step's timeout.
        """
        return

    def step_at_once(self, step: Step) -> RoundResult | None:
        """As `WorkerChannel.step_at_once`, of a direct step, for an only shard."""
        return None

    @abstractmethod
    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        """Send each shard, by index, its message without waiting.

        Raises:
            Reconfigured: there are no cuts of that index.
            LifecycleError: the shards cannot be reached from this process any more.
        """

    @abstractmethod
    def open_channel(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        """Return the channel of a worker that has joined all shards."""

    @abstractmethod
    def refresh(self) -> None:
        """Learn where the shards are now; waits for no recovery."""

    @abstractmethod
    def await_recovery(self, timeout_s: float) -> None:
        """Have dead shards replaced, wait for it, and reach the new ones from then on.

        Returns after the supervisor has looked, even if it found every shard alive.

        Raises:
            Unrecoverable: the shards cannot be recovered.
            StepTimeout: recovery took longer than `timeout_s`.
        """

    @abstractmethod
    def wait_if_moved(self, version: int) -> bool:
        """Await a recovery, for up to `step_timeout_s`; return whether `version` is outdated.

        Raises:
            Unrecoverable, StepTimeout: as `await_recovery`.
        """

    @abstractmethod
    def require_open(self) -> None:
        """Raise LifecycleError if the shards cannot be reached from this process any more."""

    @abstractmethod
    def new_token(self) -> str:
        """Return a new token for holding the shards; a supervisor can tell that its owner died."""


class SupervisorClient(ABC):
    """Reaches what recovers and reshards the shards; every call may be repeated."""

    @abstractmethod
    def started(self, *, initial: Flat | None, checkpoint: CheckpointId | None) -> None:
        """Have the supervisor watch shards that have these parameters, or a checkpoint's state."""

    @abstractmethod
    def report_cannot_complete(self) -> None:
        """Report that shards stand at different rounds and this caller cannot bring them level."""

    @abstractmethod
    def replacement_begun(self, what: str) -> int:
        """Report, before it happens, what a client replaces; return when, as snapshots count."""

    @abstractmethod
    def replacement_completed(self, begun: int) -> None:
        """Report that all shards have it; StaleEpoch if they went back meanwhile."""

    @abstractmethod
    def snapshot_taken(self) -> int:
        """Report that the state is taken, while all shards are held; return when."""

    @abstractmethod
    def checkpoint_written(self, checkpoint: CheckpointId, taken: int, *, is_whole: bool) -> None:
        """Report a snapshot's checkpoint, before it gets its manifest and once it `is_whole`."""

    @abstractmethod
    def lost_ranks(self) -> dict[int, int]:
        """Return the dead incarnation of each rank whose worker died and was not replaced."""

    @abstractmethod
    def shard_recoveries(self) -> int:
        """Return how often a standby took over, or all shards went back."""

    @abstractmethod
    def reshard(self, cuts: Sequence[Ranges]) -> None:
        """Have `len(cuts)` shards hold these ranges from the next round on.

        The caller's transport learns of the new shards by `ShardTransport.refresh`.

        Raises:
            ClusterError: the new shards could not be started or filled; the former ones are kept.
        """


class Hosts(ABC):
    """The hosts of a cluster, as somebody who takes one away sees them."""

    @abstractmethod
    def cordon(self, host: str) -> str:
        """Have all processes leave a host, and none go there; return the host's id.

        Args:
            host: its address, name, or the beginning of its id.

        Raises:
            ConfigError: there is no such host, or the cluster ends with it.
        """

    @abstractmethod
    def uncordon(self, host: str) -> None:
        """Let processes go to a host again.

        Raises:
            ConfigError: there is no such host.
        """

    @abstractmethod
    def processes_on(self, host: str) -> list[str]:
        """Return what is still to leave a host, given by its id, in words, such as "shard 1"; also
        others' programs there, which only they can move.
        """

    @abstractmethod
    def announce(self, why: str, left_s: float) -> None:
        """Announce to all that runs there that this process's host is gone in `left_s` seconds."""


class Backend(ABC):
    """The shards of one optimizer: their start and end, and the two ways to reach them."""

    name: str
    transport: ShardTransport
    supervisor: SupervisorClient
    shield: AbstractContextManager[None] = nullcontext()
    """For work that asks or changes the shards: where a Ctrl-C in its middle would leave the shards
    in the middle of a step, it is raised after the work.
    """

    @property
    @abstractmethod
    def meter(self) -> Meter | None:
        """Where this process counts what it does for the optimizer; None if nothing exports it."""

    @abstractmethod
    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """Start the shards, without state; raise ClusterError, and leave none, if it fails."""

    @abstractmethod
    def hosts(self) -> list[str]:
        """Return where each shard runs, in words."""

    @abstractmethod
    def standbys(self) -> dict[int, str]:
        """Return where each standby runs, in words, by its shard's index; it may be unfilled."""

    @abstractmethod
    def worker_group(
        self, size: int, make: Callable[..., Any], options: Options, given: tuple[Any, ...] = ()
    ) -> WorkerGroup:
        """Start `size` objects `make(rank, *given)`, each able to compute while the others do.

        Each gets copies of its own of what is `given`, which is not changed meanwhile. `options`
        say what resources each asks for.
        """

    @abstractmethod
    def close(self, *, destroy: bool) -> None:
        """Release the shards; with `destroy` end them, so that every waiting call fails."""
