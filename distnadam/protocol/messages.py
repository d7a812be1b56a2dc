"""The messages of workers and clients to a shard, and their answers: plain records.

Workers send Join, Push, TotalNorms, Pull and Leave; a worker's broken connection counts as
WorkerDied. A client that acts on the optimizer as a whole pauses every shard after the same round
(Pause, CatchUp), reads or changes it (Read, Write, SetConfig, Step, Save), and resumes it (Resume).
Arrays are the shard's own ranges. Pushes are in `pushes`, with the slice that only a relay takes,
and a shard's status is in `shard_status`; other folders import both from here. The supervisor's
orders are in `supervisor_messages`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import ScaleState
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.pushes import CompletePush as CompletePush
from distnadam.protocol.pushes import GroupPush as GroupPush
from distnadam.protocol.pushes import Push as Push
from distnadam.protocol.pushes import PushNote as PushNote
from distnadam.protocol.pushes import PushSlice as PushSlice
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.shard_status import Describe as Describe
from distnadam.protocol.shard_status import Description as Description
from distnadam.protocol.shard_status import Owners as Owners
from distnadam.protocol.shard_status import ShardSpec as ShardSpec
from distnadam.tensors.arrays import Array, Flat


@dataclass(frozen=True)
class Reserve:
    """Allocates the memory of background saves, so that the first need not wait; always legal."""


@dataclass(frozen=True, kw_only=True)
class Save:
    """Writes the held shard's state to one file; answered with the file's record.

    With `behind`, in the background: the answer is None at once, the state is copied before it
    changes, and `Collect` gets the record.
    """

    token: str
    directory: str
    file_name: str
    behind: bool = False


@dataclass(frozen=True)
class Collect:
    """Gets the record of a file written in the background, when it is complete; always legal."""

    file_name: str


FileMessage = Reserve | Save | Collect


NO_NORM = -1.0


Outcome = Literal["applied", "skipped", "refused", "voted", "disagreed", "empty"]
"""How a round ended. Only an applied one had a step. A gradient that is not finite has a round
skipped or refused, as `Options.on_nonfinite` says; a rank's `found_inf` has it skipped by a vote;
ranks whose settings differ have it refused, as ones that disagreed; and it is empty where no rank
has the gradient of any tensor.
"""


@dataclass(frozen=True, kw_only=True)
class Join:
    """A worker takes a rank over.

    From then on its predecessor is refused. A push of the predecessor that waits for others counts
    no more, unless `CompletePush` says that it does.

    Attributes:
        rank: the rank.
        incarnation: the worker's number; None asks shard 0 for one, which the others then get.
        reserve: whether no worker has joined yet, and only the predecessor is to be refused.
        process: a token of the worker's process.
    """

    rank: int
    incarnation: int | None = None
    reserve: bool = False
    process: str = ""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Answer to `Join`.

    Attributes:
        incarnation: the worker's number.
        round: the last round that the shard has decided.
        committed: the rank's last push that counted, or is certain to; None if there is none.
        member: whether the next round needs the rank.
        orphaned: whether the shard awaits norms from workers that were all replaced.
    """

    incarnation: int
    round: int = 0
    committed: PushNote | None = None
    member: bool = True
    orphaned: bool = False


@dataclass(frozen=True)
class PartialNorms:
    """Answer to `Push` where clipping needs norms: sums of squares of the mean gradient.

    `sums` has, for each tensor in the shard's ranges, one float64 per chunk.
    """

    round: int
    sums: tuple[tuple[int, Array], ...]


@dataclass(frozen=True, kw_only=True)
class TotalNorms:
    """The second phase of a push: each tensor's sum of squares over all shards.

    `square_sums` is float64 of shape (tensors,).
    """

    epoch: int
    rank: int
    incarnation: int
    round: int
    square_sums: Array
    want_parameters: bool = False


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Gets the parameters when round `at_least`, a number known in `epoch`, is decided."""

    rank: int
    incarnation: int
    at_least: int = 0
    want_parameters: bool = False
    epoch: int = 0


@dataclass(frozen=True)
class Leave:
    """The worker departs after a whole step."""

    rank: int
    incarnation: int


@dataclass(frozen=True)
class WorkerDied:
    """The worker's process died: its connection was closed without `Leave`."""

    rank: int
    incarnation: int


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class RoundResult:
    """Answer to `Push`, `TotalNorms`, `Pull` and `Step`: how the last round ended.

    Attributes:
        epoch: the current epoch.
        round: the last decided round.
        iterations: steps applied so far.
        outcome: how the round ended.
        rejection: why it applied no step, if so.
        lr: the learning rate of the last applied step, equal on all shards.
        buffer: which of the two parameter buffers is current.
        parameters: the shard's ranges, if asked for.
        rewound: the epoch in which all shards last rewound.
        revision: of the hyper-parameters of the last applied step, equal on all shards.
        loss_scale: of the next round; 0 if none is kept.
        gradient_norm: the norm of the mean gradient of the last round over all tensors, before it
            was clipped; `NO_NORM` where the shards had no norms of that round.
    """

    epoch: int
    round: int
    iterations: int
    outcome: Outcome
    rejection: str | None
    lr: float
    buffer: int
    parameters: Flat | None = None
    rewound: int = 0
    revision: int = 0
    loss_scale: float = 0.0
    gradient_norm: float = NO_NORM


@dataclass(frozen=True)
class Pause:
    """Holds the shard between two rounds; answered when it is this caller's turn and nothing is
    being computed.
    """

    token: str


@dataclass(frozen=True)
class CatchUp:
    """Lets the held shard complete rounds up to `round`; answered when that one is decided."""

    token: str
    round: int


@dataclass(frozen=True)
class Resume:
    """Ends the hold, or the wait for it."""

    token: str


@dataclass(frozen=True, kw_only=True)
class Paused:
    """Answer to `Pause`: the state of the round after which the shard stands still.

    Attributes:
        epoch: the current epoch.
        round: the last decided round.
        clock: the clock after it.
        skipped: rounds skipped so far.
        config: the hyper-parameters that the next step uses.
        revision: how often they were replaced.
        pending: the ranks whose pushes for the next round wait.
        ledger: the pushes counted so far (`Ledger.to_dict`).
        rewound: the epoch in which all shards last rewound.
        awaits_norms: whether the next round was measured already, and waits for norms.
        loss_scale: the state of the scale of the next round; None if none is kept.
    """

    epoch: int
    round: int
    clock: Clock
    skipped: int
    config: NadamConfig
    revision: int
    pending: tuple[int, ...]
    ledger: dict[str, Any] = field(default_factory=dict)
    rewound: int = 0
    awaits_norms: bool = False
    loss_scale: ScaleState | None = None


@dataclass(frozen=True)
class Read:
    """Gets arrays of the held shard by name; without names, all of them."""

    token: str
    what: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Write:
    """Replaces arrays of the held shard, and its clock if given; a new epoch begins, and pushes
    that wait are refused.
    """

    token: str
    state: dict[str, Flat]
    clock: Clock | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class SetConfig:
    """Replaces the hyper-parameters of the held shard from the next step on.

    `revision` is later than any before. Clipping by norm is not switched on or off while a round
    waits for norms.
    """

    token: str
    config: NadamConfig
    revision: int


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class Step:
    """A direct step: of the held shard, from an averaged gradient; answered as a push is.

    `incarnation` and `round` identify it, so that it counts once however often it is sent. With
    `in_place` nobody sees the present parameters, so the new ones may be written over them.

    An optimizer's only shard need not be held: without a token the step is taken if nobody holds it
    or has pushed, and the epoch is the present one; one that clips by norm must be held.
    """

    token: str | None
    incarnation: int
    round: int
    gradients: Flat | None
    rejection: str | None = None
    in_place: bool = False
    epoch: int = 0
    settings: RoundSettings = ORDINARY


@dataclass(frozen=True)
class StepNorms:
    """The second phase of `Step`, as `TotalNorms` is of `Push`."""

    token: str
    square_sums: Array


_Worker = Join | CompletePush | Push | GroupPush | TotalNorms | Pull | Leave | WorkerDied


_Holder = Pause | CatchUp | Resume | Read | Write | SetConfig | Step | StepNorms


Message = _Worker | _Holder | FileMessage | Describe
