"""The seam between those who talk to shards and where the shards live. Nothing here knows which it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from distnadam.arrays import Flat
from distnadam.messages import Message, ShardSpec


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


class Backend(ABC):
    """All shards of one optimizer.

    `parameters` are both buffers of the whole model's parameters where this process shares them with the shards, else None.
    `shared_files` says whether the shards see this process's files for certain.
    """

    name: str
    parameters: tuple[Flat, Flat] | None = None

    @abstractmethod
    def start(self, specs: Sequence[ShardSpec]) -> None:
        """Make the shards; raise a ClusterError where they cannot be had, leaving none behind."""

    @abstractmethod
    def post(self, messages: Mapping[int, Message]) -> Pending:
        """Send each shard its message, without waiting."""

    @abstractmethod
    def close(self, *, destroy: bool) -> None:
        """Let go of the shards; with `destroy`, end them, so that everyone who waits for one gets an error."""
