"""What a supervisor may do, as data: `policy` returns these, `executor` carries them out. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fence:
    """Make certain that these dead shards are gone, then look again.

    Only then is it known how far their standbys are: all that they sent has arrived.
    """

    shards: tuple[int, ...]


@dataclass(frozen=True)
class Promote:
    """Make the standbys of these shards primaries."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class Rewind:
    """Have all shards go back together; start these again first. With `undoing` they may lose the
    last replacement, which is half done.
    """

    shards: tuple[int, ...]
    why: str
    undoing: bool = False


@dataclass(frozen=True)
class Complete:
    """Send the latest Reconfigure to the shards that missed it."""

    shards: tuple[int, ...]
    epoch: int


@dataclass(frozen=True)
class CompleteConfig:
    """Bring the newest hyper-parameters to the shards that missed them."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class ReleaseHold:
    """Have the shards go on that are held by this token."""

    token: str


@dataclass(frozen=True)
class ReportWorkersDied:
    """Report to the shards that these ranks' workers, of these incarnations, died."""

    workers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FinishDeadWorkers:
    """Refuse these ranks' dead workers everywhere, and complete their last pushes or none."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class DropStandbys:
    """End the standbys of these shards, which are stale, or not wanted where they are."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class DropSuccessors:
    """End what was to replace the standbys of these shards and could not be filled."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class StartStandbys:
    """Start a standby's process for each of these shards, beside the one that it has, if any."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class FillStandbys:
    """Have these shards copy their state to their standbys, which follow them from then on; to
    the standby's successor, where there is one.
    """

    shards: tuple[int, ...]


@dataclass(frozen=True)
class HandOver:
    """End these living shards, whose hosts are to be left; their standbys take over."""

    shards: tuple[int, ...]


@dataclass(frozen=True)
class Depart:
    """Leave these ranks out of every round that nobody has begun."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Admit:
    """Make these ranks members from a boundary on."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class AbandonRanks:
    """Fail those who wait for these ranks with WorkerLost."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Fail:
    """Give up: fail every client with this reason."""

    why: str


Decision = (
    Fence
    | Promote
    | Rewind
    | Complete
    | CompleteConfig
    | ReleaseHold
    | ReportWorkersDied
    | FinishDeadWorkers
    | DropStandbys
    | DropSuccessors
    | StartStandbys
    | FillStandbys
    | HandOver
    | Depart
    | Admit
    | AbandonRanks
    | Fail
)
