"""The seam between those who run the shards' processes and what these run on.

`ShardProcesses` is what a reshard needs; `ProcessManager` adds what only makes sense where
processes die: fencing, promotion, watching. Nothing here knows Ray.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distnadam.protocol.messages import Read, ShardSpec
from distnadam.protocol.supervisor_messages import Load, Reconfigure, ShardControlState
from distnadam.tensors.arrays import Flat, empty_flat, memory_for
from distnadam.tensors.copy_plan import copy_plan
from distnadam.tensors.layout import Ranges, sizes_of


@dataclass(frozen=True)
class ShardProcess:
    """One process of an optimizer.

    Args:
        index: of the shard that it holds, or is the standby of.
        handle: how its manager reaches it.
        address: where it runs, in the manager's terms.
    """

    index: int
    handle: Any
    address: Any


@dataclass(frozen=True, kw_only=True)
class Move:
    """A state on its way from paused shards to new ones.

    Args:
        token: the old shards are paused by it.
        old: the present shards, in order.
        new: the shards that shall hold the state, in order.
        old_cuts: the ranges of `old`.
        new_cuts: the ranges of `new`.
        load: what the new ones are sent, to be completed by state and control state.
    """

    token: str
    old: Sequence[ShardProcess]
    new: Sequence[ShardProcess]
    old_cuts: Sequence[Ranges]
    new_cuts: Sequence[Ranges]
    load: Load


class ShardProcesses(ABC):
    """Starts, reaches and ends the processes that hold shards."""

    @abstractmethod
    def start(
        self,
        spec: ShardSpec,
        *,
        standby: bool,
        near: Sequence[ShardProcess],
        beside: ShardProcess | None = None,
    ) -> ShardProcess:
        """Start a process for a shard, or for its standby.

        Args:
            spec: the shard's.
            standby: whether it shall follow the shard instead of being it.
            near: the present processes, whose memory it may share.
            beside: the process whose host it goes to, if there is room and that is not to be left.

        Raises:
            ClusterError: no process can be started.
        """

    @abstractmethod
    def terminate(self, *processes: ShardProcess) -> None:
        """End processes that are not needed any more, stopped ones too."""

    @abstractmethod
    def ask(
        self, targets: Mapping[int, ShardProcess], messages: Mapping[int, Any], timeout_s: float
    ) -> dict[int, Any]:
        """Send each target its message; return answers or errors by index, and raise none.

        An error is ShardLost of a dead process, StepTimeout of a silent one, or what the shard
        raised. `DescribeStandby` goes to standbys, every other message to shards. Messages without
        a target are left out.
        """

    @abstractmethod
    def control_state(self, process: ShardProcess) -> ShardControlState:
        """Return where a paused shard stands; raise ShardLost if it is dead."""

    def move(self, move: Move) -> list[Exception]:
        """Have new shards load what old ones hold; return what went wrong.

        The arrays come through this process, one new shard's at a time.
        """
        read = self.ask(
            dict(enumerate(move.old)),
            {index: Read(move.token) for index in range(len(move.old))},
            MOVE_S,
        )
        errors = [answer for answer in read.values() if isinstance(answer, Exception)]
        if errors:
            return errors
        load = dataclasses.replace(move.load, control_state=self.control_state(move.old[0]))
        for process, ranges in zip(move.new, move.new_cuts, strict=True):
            with memory_for(f"shard {process.index}: a copy of its state"):
                state = _cut(read, move.old_cuts, ranges)
            loaded = self.ask({0: process}, {0: dataclasses.replace(load, state=state)}, MOVE_S)
            if isinstance(loaded[0], Exception):
                return [loaded[0]]
        return []


def _cut(
    read: Mapping[int, Mapping[str, Flat]], cuts: Sequence[Ranges], ranges: Ranges
) -> dict[str, Flat]:
    """Return the arrays of some ranges, copied from what shards of other ranges hold."""
    state = {name: empty_flat(sizes_of(ranges)) for name in read[0]}
    for copy in copy_plan(cuts, ranges):
        there, here = cuts[copy.source][copy.space][0], ranges[copy.space][0]
        for name, flat in state.items():
            source = read[copy.source][name][copy.space][copy.begin - there : copy.end - there]
            flat[copy.space][copy.begin - here : copy.end - here] = source
    return state


MOVE_S = 3600.0
"""Seconds in which shards move their state."""


class ProcessManager(ShardProcesses):
    """What a supervisor can do to the processes of its optimizer."""

    @abstractmethod
    def promote(
        self, standby: ShardProcess, reconfigure: Reconfigure, *, near: Sequence[ShardProcess]
    ) -> ShardProcess:
        """Make a standby its shard's primary, once it has all that the dead primary sent.

        Raises:
            ClusterError: it is dead, or never got a state.
        """

    @abstractmethod
    def fence(self, process: ShardProcess) -> None:
        """Make certain that a process can neither write nor answer any more."""

    @abstractmethod
    def watch(self, process: ShardProcess) -> None:
        """Report `ProcessDied` to the supervisor as soon as this process ends."""

    def is_to_leave(self, process: ShardProcess) -> bool:
        """Whether a process is on a host that is to be left, and there is another to go to."""
        return False

    def is_leader(self) -> bool:
        """Whether the supervisor may decide now.

        False while it may have been cut off, and another put in its place.
        """
        return True

    def is_dead(self, token: str) -> bool:
        """Whether the process that made a token is known to be gone."""
        return False
