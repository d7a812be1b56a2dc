"""What the supervisor says to shards and standbys, and what a primary tells its standby: plain
records.

An order bears a new epoch and is obeyed whoever holds the shard; it waits only for what is being
computed.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import Outcome, PushNote
from distnadam.protocol.shard_status import Owners
from distnadam.schedules import Rate
from distnadam.tensors.arrays import Flat

Reason = Literal["replaced", "rewound", "reconfigured"]


MembershipHistory = tuple[tuple[int, tuple[int, ...]], ...]
"""Membership: from each of these rounds on, these ranks; in order. Kept over a rewind, so that a
replay has the same members.
"""


@dataclass(frozen=True, kw_only=True)
class Reconfigure:
    """From this epoch on: the membership, and the newest incarnation of each rank. The round in
    progress goes on.
    """

    epoch: int
    schedule: MembershipHistory
    newest: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Take the state of a checkpoint, or parameters with nothing behind them; whoever waits is told
    `Rewound`.

    Args:
        epoch: from now on.
        directory: the checkpoint's; None where `params` says all.
        manifest: the manifest file's bytes.
        leftovers: files whose bytes that no shard needs this one verifies.
        params: the shard's ranges.
        state: all arrays of the shard's ranges, as other shards held them, and `control_state`,
            where those stood in time.
        schedule: the membership; empty leaves it.
        newest: the newest incarnation of each rank, where it is known.
        here: the ranks that a living worker holds, likewise.
        highest_round: the latest round that was ever decided.
        lr: the learning rate from now on; None leaves the shard's.
    """

    epoch: int
    directory: str | None = None
    manifest: bytes = b""
    leftovers: tuple[int, ...] = ()
    params: Flat | None = None
    state: dict[str, Flat] | None = None
    control_state: "ShardControlState | None" = None
    schedule: MembershipHistory = ()
    newest: dict[int, int] = field(default_factory=dict)
    live_owners: Owners = field(default_factory=dict)
    highest_round: int = 0
    lr: Rate | None = None

    @property
    def reason(self) -> Reason:
        """Why its epoch begins: a reshard goes on from where the shards stood, a load goes back."""
        return "reconfigured" if self.control_state is not None else "rewound"


@dataclass(frozen=True)
class AttachStandby:
    """Copy the state to a standby between two rounds, and keep it up from then on; `standby` says
    how it is reached.
    """

    standby: Any


@dataclass(frozen=True)
class AbandonRank:
    """Nobody takes the rank of this dead worker over: tell those who wait for it `WorkerLost`, at
    once until somebody does after all.
    """

    rank: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class ShardControlState:
    """Where a shard stands in time: what a standby, or a shard that loads, goes on from."""

    epoch: int
    round: int
    skipped: int
    clock: Clock
    lr: float
    active: int
    outcome: Outcome
    rejection: str | None
    ledger: dict[str, Any]
    schedule: MembershipHistory = ()
    changed: str | None = None
    history: tuple[tuple[int, Reason], ...] = ()
    counted: dict[int, PushNote] = field(default_factory=dict)
    live_owners: Owners = field(default_factory=dict)
    highest_round: int = 0


@dataclass(frozen=True, kw_only=True)
class ReplicatedRound:
    """One decided round for the standby; its mean gradient, scaled and clipped, lies in memory that
    both map, or in `gradients`.
    """

    round: int
    skipped: int
    outcome: Outcome
    rejection: str | None
    counted: dict[int, PushNote]
    lr: float
    active: int
    clock: Clock
    gradients: Flat | None = None


@dataclass(frozen=True)
class ReplicatedJoin:
    """A rank was taken over, by a worker of that process; None: nobody holds it, since that worker
    left, died, or is yet to come.
    """

    rank: int
    incarnation: int
    process: str | None = None


@dataclass(frozen=True)
class Retire:
    """Other shards hold these ranges from this epoch on: refuse everything, so that whoever asks
    looks for them.
    """

    epoch: int


@dataclass(frozen=True)
class DescribeStandby:
    """Asks a standby for the last round that it has of its primary; None if it has no state.

    It answers once it has applied all that a dead primary sent.
    """


@dataclass(frozen=True)
class DetachStandby:
    """The primary goes on without this standby, which must never step in for it again."""


Record = ReplicatedRound | ReplicatedJoin | Reconfigure | DetachStandby


Order = Reconfigure | Load | AttachStandby | AbandonRank | Retire
