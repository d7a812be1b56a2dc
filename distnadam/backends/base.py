"""The seam between those who talk to shards and where the shards live. Nothing here knows which it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distnadam.arrays import Flat
from distnadam.layout import Layout, Ranges
from distnadam.messages import Message, Norms, Push, ShardSpec


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


class Link(ABC):
    """One worker's way to all shards.

    `gradients` is the memory that the worker writes its gradients into; `parameters` are both buffers of the whole model's parameters
    where the worker shares them with every shard, else None, and answers bring what was asked for.
    """

    gradients: Flat
    parameters: tuple[Flat, Flat] | None = None

    @abstractmethod
    def post(self, messages: Mapping[int, Push] | Mapping[int, Norms]) -> Pending:
        """Send each shard its push or norms, without waiting; a push's gradients are views of `gradients`."""

    @abstractmethod
    def close(self) -> None:
        """Let go; views of the memory stay good."""


class Team(ABC):
    """Objects that compute beside the shards, one per rank, called all at once by the name of a method."""

    @abstractmethod
    def call(self, method: str, *args: Any) -> Pending:
        """Call a method of every member, without waiting."""

    @abstractmethod
    def close(self) -> None:
        """End the members; to be called after the shards they wait for have gone or answered."""


class Backend(ABC):
    """All shards of one optimizer."""

    name: str

    @abstractmethod
    def start(self, specs: Sequence[ShardSpec]) -> None:
        """Make the shards; raise a ClusterError where they cannot be had, leaving none behind."""

    @abstractmethod
    def post(self, messages: Mapping[int, Message]) -> Pending:
        """Send each shard its message, without waiting."""

    @abstractmethod
    def link(self, layout: Layout, ranges: list[Ranges], rank: int, incarnation: int) -> Link:
        """Return the way that a worker which has joined talks to the shards."""

    def require_open(self) -> None:
        """Raise LifecycleError where the shards cannot be reached from this process any more; by default a post tells."""
        return

    @abstractmethod
    def close(self, *, destroy: bool) -> None:
        """Let go of the shards; with `destroy`, end them, so that everyone who waits for one gets an error."""

    @abstractmethod
    def team(self, size: int, make: Callable[[int], Any], *, cpus: float) -> Team:
        """Make `size` objects by `make(rank)`, each where it can compute without the others' leave, asking for `cpus` CPUs each."""
