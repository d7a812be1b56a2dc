"""The seam between those who talk to shards and where the shards live. Nothing here knows which it
is.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnadam.config import Options
from distnadam.errors import Unrecoverable
from distnadam.metrics.meter import Meter
from distnadam.protocol.messages import Message, Push, ShardSpec, TotalNorms
from distnadam.protocol.supervisor_messages import Order
from distnadam.tensors.arrays import Flat
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


@dataclass(frozen=True, eq=False)
class Routes:
    """What each shard holds, and which of them share memory with a worker."""

    ranges: list[Ranges]
    lanes: frozenset[int]


class WorkerChannel(ABC):
    """One worker's way to all shards.

    `gradients` is the memory that the worker writes its gradients into; `parameters` are both
    buffers of the whole model's parameters where the worker shares them with every shard, else
    None, and answers bring what was asked for. `wiring` is another object whenever a shard is
    reached in another way; None where nothing moves.
    """

    gradients: Flat
    parameters: tuple[Flat, Flat] | None = None
    wiring: Routes | None = None

    @abstractmethod
    def post(self, messages: Mapping[int, Push] | Mapping[int, TotalNorms]) -> Pending:
        """Send each shard its push or norms, without waiting; a push's gradients are views of
        `gradients`.
        """

    def reconnect(self, ranges: list[Ranges], incarnation: int) -> None:
        """Follow the shards to where they are now, and to what each holds now, as that worker; the
        memory stays where it is.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Let go; views of the memory stay good."""


class WorkerGroup(ABC):
    """Objects that compute beside the shards, one per rank, called by the name of a method."""

    @abstractmethod
    def call(self, rank: int, method: str, *args: Any) -> None:
        """Call a method of one member, without waiting."""

    @abstractmethod
    def results(self, timeout_s: float) -> list[tuple[int, Any]]:
        """Return the ranks whose calls have ended, with what they returned or raised, waiting so
        long for a first one.
        """

    @abstractmethod
    def replace(self, rank: int) -> None:
        """End a member where its process is one, and make a new one in its place; its call is
        forgotten.
        """

    @abstractmethod
    def close(self) -> None:
        """End the members; to be called after the shards they wait for have gone or answered."""


class Backend(ABC):
    """All shards of one optimizer."""

    name: str

    @property
    def meter(self) -> Meter | None:
        """Where this process counts what it does for the optimizer; None where nobody would see
        it.
        """
        return None

    def token(self) -> str:
        """Return a new token to hold the shards by; where processes die, it tells a supervisor
        whose it is.
        """
        return secrets.token_hex(8)

    @abstractmethod
    def start(self, specs: Sequence[ShardSpec], replicas: int) -> None:
        """Make the shards; raise a ClusterError where they cannot be had, leaving none behind."""

    def began(self, *, initial: Flat | None, directory: str | None) -> None:
        """Take that the shards have their state, and what they can go back to: these parameters, or
        a checkpoint.
        """
        return

    def await_recovery(self, timeout_s: float) -> None:
        """Wait until a dead shard is replaced, and reach the new one from then on.

        Raises:
            Unrecoverable: it cannot be, by default: where nothing recovers, nothing dies by itself.
            StepTimeout: it was not in time.
        """
        raise Unrecoverable("the shards of this process cannot be replaced")

    def refresh(self) -> None:
        """Learn where the shards are now, without waiting for anything."""
        return

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """How many shards there are, as far as this process knows."""

    def hosts(self) -> list[str]:
        """Return where each shard runs, in words."""
        return ["this process"] * self.num_shards

    def standbys(self) -> dict[int, str]:
        """Return where the standbys run, in words, by the index of their shard; one that is there
        may be yet to be filled.
        """
        return {}

    @abstractmethod
    def reshard(self, num_shards: int, cuts: Sequence[Ranges]) -> None:
        """Have so many shards hold these ranges from the next round on, in place of the present
        ones.

        Raises:
            ClusterError: they cannot be had; the present ones go on.
        """

    @property
    def version(self) -> int:
        """A number that grows whenever the shards are reached in another way, or went back."""
        return 0

    def wait_if_moved(self, version: int) -> bool:
        """Look whether that number has grown."""
        return False

    def report_cannot_complete(self) -> None:
        """Say that shards stand at different rounds, and this caller cannot help."""
        return

    def changing(self, what: str) -> None:
        """Say, before it is done, that the state is replaced from outside, which no replay from a
        checkpoint would repeat.
        """
        return

    def changes(self) -> int:
        """Return a number that is another one after every `changing`; it belongs to a state while
        the shards are held.
        """
        return 0

    def saved(self, root: str, changes: int) -> None:
        """Say that a checkpoint is complete under this directory, of a state that had that number
        of changes.
        """
        return

    def lost_ranks(self) -> dict[int, int]:
        """Return the ranks whose worker died and that nobody has taken over, with the incarnation
        that died.
        """
        return {}

    @abstractmethod
    def post(self, messages: Mapping[int, Message | Order]) -> Pending:
        """Send each shard its message, without waiting."""

    @abstractmethod
    def link(
        self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int
    ) -> WorkerChannel:
        """Return the way that a worker which has joined talks to the shards."""

    def require_open(self) -> None:
        """Raise LifecycleError where the shards cannot be reached from this process any more; by
        default a post tells.
        """
        return

    @abstractmethod
    def close(self, *, destroy: bool) -> None:
        """Let go of the shards; with `destroy`, end them, so that everyone who waits for one gets
        an error.
        """

    @abstractmethod
    def team(self, size: int, make: Callable[[int], Any], options: Options) -> WorkerGroup:
        """Make `size` objects by `make(rank)`, each where it can compute without the others' leave;
        `options` say what each asks for.
        """
