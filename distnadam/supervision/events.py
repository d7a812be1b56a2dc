"""What a supervisor's own process puts into its queue of events, beside the reports of shards."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from distnadam.protocol.supervisor_events import Report
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.shard_map import ShardMap
from distnadam.tensors.layout import Ranges


@dataclass(frozen=True, kw_only=True)
class ProcessDied:
    """A watched process ended."""

    process: ShardProcess


@dataclass(frozen=True, kw_only=True)
class StandbyStale:
    """A primary goes on without this standby, which must not step in for it any more."""

    standby: ShardProcess


@dataclass(frozen=True, kw_only=True)
class StandbyStarted:
    """A process for a standby of shard `index` was started; `process` is None if none could be."""

    layout_generation: int
    index: int
    process: ShardProcess | None


@dataclass(frozen=True, kw_only=True)
class StandbyFilled:
    """A standby got its primary's state, or `error` prevented it."""

    layout_generation: int
    standby: ShardProcess
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class ReshardRequested:
    """Shards of these ranges shall hold the state; `done` carries what prevented it."""

    cuts: Sequence[Ranges]
    done: Future[None]


@dataclass(frozen=True, kw_only=True)
class ShardSuspected:
    """A client met a shard that does not answer; `answer` gets the map after a look."""

    answer: Future[ShardMap]


@dataclass(frozen=True, kw_only=True)
class LookNow:
    """Look at the shards at once."""


Event = (
    Report
    | ProcessDied
    | StandbyStale
    | StandbyStarted
    | StandbyFilled
    | ReshardRequested
    | ShardSuspected
    | LookNow
)
