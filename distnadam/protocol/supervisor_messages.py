"""The supervisor's orders to shards and standbys, and a primary's records for its standby.

An order carries a new epoch, and is carried out even while a client holds the shard; it waits only
for what is being computed.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import ScaleState
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import Outcome, PushNote
from distnadam.protocol.shard_status import Owners
from distnadam.tensors.arrays import Flat

Reason = Literal["replaced", "rewound", "reconfigured"]


MembershipHistory = tuple[tuple[int, tuple[int, ...]], ...]
"""From each of these rounds on, in order, these ranks. Kept over a rewind, so that a replay has the
same members.
"""


@dataclass(frozen=True, kw_only=True)
class Reconfigure:
    """Begins an epoch with this membership and these newest incarnations; the round goes on.

    A standby that takes over by it takes the hyper-parameters too, if they are of a later
    `revision` than its own.
    """

    epoch: int
    schedule: MembershipHistory
    newest: dict[int, int] = field(default_factory=dict)
    config: NadamConfig | None = None
    revision: int = 0


@dataclass(frozen=True, kw_only=True)
class Load:
    """Replaces the whole state: by a checkpoint's, by parameters, or by other shards' state.

    All callers that wait get `Rewound`, or `Reconfigured` if `control_state` is given.

    Args:
        epoch: the epoch that begins.
        directory: the checkpoint's; None for another source.
        manifest: the manifest file's bytes.
        leftovers: files of which this shard verifies the bytes that no shard needs.
        params: the shard's ranges.
        state: all arrays of the shard's ranges, as other shards held them.
        control_state: those shards' state but for the arrays.
        schedule: the membership; empty leaves it.
        newest: the newest incarnation of each rank, as far as it is known.
        live_owners: the ranks that a living worker holds, as far as they are known.
        highest_round: the latest round ever decided.
        config: the hyper-parameters from now on; None leaves the shard's.
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
    config: NadamConfig | None = None

    @property
    def reason(self) -> Reason:
        """Why its epoch begins: a reshard goes on from where the shards stood, a load goes back."""
        return "reconfigured" if self.control_state is not None else "rewound"


@dataclass(frozen=True)
class AttachStandby:
    """Copies the state to a standby between two rounds, and replicates every round from then on.

    `standby` is what the host needs to reach it.
    """

    standby: Any


@dataclass(frozen=True)
class AbandonRank:
    """Fails waiting and new pushes with WorkerLost until a worker joins this rank."""

    rank: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class ShardControlState:
    """A shard's state but for the arrays: what a standby, or a shard that loads, continues from."""

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
    history: tuple[tuple[int, Reason], ...] = ()
    counted: dict[int, PushNote] = field(default_factory=dict)
    live_owners: Owners = field(default_factory=dict)
    highest_round: int = 0
    revision: int = 0
    applied_revision: int = 0
    overrides: bytes = b""
    loss_scale: ScaleState | None = None


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class ReplicatedRound:
    """One decided round, for the standby.

    One that does not map its primary's memory gets the mean gradient too, scaled and clipped.
    """

    round: int
    skipped: int
    outcome: Outcome
    rejection: str | None
    counted: dict[int, PushNote]
    lr: float
    active: int
    clock: Clock


@dataclass(frozen=True)
class ReplicatedJoin:
    """A rank belongs to a worker of that process; None: its worker left, died, or has not come."""

    rank: int
    incarnation: int
    process: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReplicatedConfig:
    """The hyper-parameters are these from here on."""

    config: NadamConfig
    revision: int


@dataclass(frozen=True)
class Retire:
    """Other shards hold these ranges from this epoch on; all further messages are refused."""

    epoch: int


@dataclass(frozen=True)
class DescribeStandby:
    """Asks a standby for the last round that it has of its primary; None if it has no state.

    It answers once it has applied all that a dead primary sent.
    """


@dataclass(frozen=True)
class DetachStandby:
    """The primary goes on without this standby, which must never replace it."""


Record = ReplicatedRound | ReplicatedJoin | ReplicatedConfig | Reconfigure | DetachStandby


Order = Reconfigure | Load | AttachStandby | AbandonRank | Retire
