"""What shards and workers report to the supervisor: plain records, which travel by Ray.

A report says what happened and asks for nothing; the supervisor looks and decides by itself.
Requests that have an answer are in `messages` and `supervisor_messages`.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RankJoined:
    """A new worker of this incarnation took the rank over."""

    rank: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class RankLeft:
    """The rank's worker departed after a whole step."""

    rank: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class RankDied:
    """The rank's worker died, and a shard has refused it since."""

    rank: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class StandbyLost:
    """A shard goes on without this standby, which may not know it, and needs a new one unless it
    has another.
    """

    shard: int
    standby: Any


@dataclass(frozen=True, kw_only=True)
class CannotComplete:
    """Shards stand at different rounds, and the caller cannot complete the earlier one."""


Report = RankJoined | RankLeft | RankDied | StandbyLost | CannotComplete
