"""The seam between a supervisor and the processes of its optimizer. Nothing here knows what they
run on.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import Load, Reconfigure
from distnadam.tensors.layout import Ranges

Cuts = tuple[Sequence[Ranges], Sequence[Ranges]]
"""The ranges of the present shards, and of those that are to replace them."""


@dataclass(frozen=True)
class ShardProcess:
    """One process: whose shard, a handle that only the crew understands, and where it is to be
    found.
    """

    index: int
    handle: Any
    place: Any


class ProcessManager(ABC):
    """What a supervisor can do to the processes of its optimizer."""

    @abstractmethod
    def start(
        self, spec: ShardSpec, *, standby: bool, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        """Make a process for a shard, or its standby, beside the present ones; raise ClusterError
        where none can be had.
        """

    @abstractmethod
    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        """Make a standby its shard's primary, once it has all that the dead one sent."""

    @abstractmethod
    def fence(self, process: ShardProcess) -> None:
        """End a process for certain, so that it can neither write nor answer any more."""

    @abstractmethod
    def terminate(self, *processes: ShardProcess) -> None:
        """End processes that are not needed any more, stopped ones too."""

    def is_leader(self) -> bool:
        """Whether the supervisor may decide anything now; not while it may have been cut off, and
        another put in its place.
        """
        return True

    def is_dead(self, token: str) -> bool:
        """Whether the process that made a token is known to be gone."""
        return False

    @abstractmethod
    def watch(self, process: ShardProcess) -> None:
        """Tell the supervisor (`died`) as soon as this process ends."""

    @abstractmethod
    def move(
        self,
        token: str,
        old: Sequence[ShardProcess],
        new: Sequence[ShardProcess],
        cuts: Cuts,
        order: Load,
    ) -> list[Exception]:
        """Have new shards load what old ones, held by that token, hold; return what went wrong.

        Args:
            token: by which the old shards are held.
            old: in their order.
            new: in theirs.
            cuts: what the old ones hold, and what the new ones shall.
            order: the new ones' order, without its state and standing.
        """

    @abstractmethod
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        """Send each its message; return by index the answers, or the errors: ShardLost of one that
        died, StepTimeout of a silent one.
        """
