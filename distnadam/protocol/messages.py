"""What callers say to a shard and what it answers: plain records, the whole protocol in one place.

Workers send Join, Push, Norms, Pull and Leave, and the end of a worker's line says Lost; whoever
acts on the optimizer as a whole first holds every shard at one round (Hold, Advance), then reads or
writes (Read, Write, SetRate, Step, and `filing`), then lets go (Release). Arrays are the shard's
own range. What a shard says of itself is in `description`; what the supervisor says to one, which
nobody may refuse, in `orders`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.shard_status import Describe as Describe
from distnadam.protocol.shard_status import Description as Description
from distnadam.protocol.shard_status import ShardSpec as ShardSpec
from distnadam.schedules import Rate
from distnadam.tensors.arrays import Array, Flat


@dataclass(frozen=True)
class Reserve:
    """Asks for the memory that snapshots are taken into, so that they need not wait for it; always
    legal.
    """


@dataclass(frozen=True, kw_only=True)
class Save:
    """Asks the held shard to write its state to one file; answered with the file's record.

    With `behind` the answer is None at once; the state is copied before it changes, then written,
    and `Collect` asks for its record.
    """

    token: str
    directory: str
    file_name: str
    behind: bool = False


@dataclass(frozen=True)
class Collect:
    """Asks for the record of a file that is written behind the training, once it is; always
    legal.
    """

    file_name: str


@dataclass(frozen=True)
class Saved:
    """A file with the state as of `num_changes` replacements is complete; from the shard's host."""

    num_changes: int


FileMessage = Reserve | Save | Collect


Outcome = Literal["applied", "skipped", "refused"]


@dataclass(frozen=True, kw_only=True)
class Join:
    """A worker takes a rank over. Shard 0 gives it an incarnation (None asks for one); the others
    are told it.

    From then on its predecessor is refused, and a push of that one which waits for others is set
    aside until the new worker pushes, or until `CompletePush` says that it counts. `reserve` does
    all this without a worker: nobody is there yet. `process` is a token of the worker's.
    """

    rank: int
    incarnation: int | None = None
    reserve: bool = False
    process: str = ""


@dataclass(frozen=True, kw_only=True)
class PushNote:
    """A push as others speak of it: by whom, for which round, in which dtypes it lies in its
    worker's memory, or its complaint.
    """

    incarnation: int
    round: int
    dtypes: dict[str, str] | None
    rejection: str | None = None


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The worker's incarnation, the rounds that the shard has decided, and the push of a
    predecessor that it has counted or is about to.

    `member` is whether the coming round needs the rank, `orphaned` whether the shard awaits norms
    from workers that are all taken over.
    """

    incarnation: int
    round: int = 0
    committed: PushNote | None = None
    member: bool = True
    orphaned: bool = False


@dataclass(frozen=True)
class CompletePush:
    """A push of a worker that was taken over counts after all, since another shard has counted it.

    `gradients` are the sender's where it has them; else the shard's host fills them in from the
    worker's memory. They are needed where the shard has not set the push aside.
    """

    rank: int
    note: PushNote
    gradients: Flat | None = None


@dataclass(frozen=True, kw_only=True)
class Push:
    """One rank's gradients for one round, or its complaint that they are not finite.

    `gradients` are this shard's ranges in the spaces' dtypes or in half precision (None beside a
    complaint). They are not copied: the sender leaves them alone until the round is decided or the
    push refused.
    """

    epoch: int
    rank: int
    incarnation: int
    round: int
    gradients: Flat | None
    rejection: str | None = None
    want_parameters: bool = False


@dataclass(frozen=True)
class PartialNorms:
    """Where clipping needs norms: the sums of squares of each chunk of the mean gradient, for each
    tensor in the shard's ranges.
    """

    round: int
    sums: tuple[tuple[int, Array], ...]


@dataclass(frozen=True, kw_only=True)
class TotalNorms:
    """The second phase of a push: the sum of squares of each tensor of the whole model, float64 of
    shape (tensors,).
    """

    epoch: int
    rank: int
    incarnation: int
    round: int
    square_sums: Array
    want_parameters: bool = False


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Asks for the parameters once `at_least` rounds are decided, a number that was true in
    `epoch`.
    """

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
    """The worker's process died, as the end of its line told."""

    rank: int
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """Where a shard stands after a round: how it ended, and the parameters where they were asked
    for.

    `buffer` says which of the two parameter buffers holds them; `lr` is the rate of the last
    applied step, equal on all shards; `rewound` is the epoch in which all shards last went back.
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


@dataclass(frozen=True)
class Pause:
    """Stop before the next round; answered in turn once this caller alone holds the shard and
    nothing is being computed.
    """

    token: str


@dataclass(frozen=True)
class CatchUp:
    """Complete rounds up to `round`, though held; answered when it is decided."""

    token: str
    round: int


@dataclass(frozen=True)
class Resume:
    """Go on."""

    token: str


@dataclass(frozen=True, kw_only=True)
class Paused:
    """Answer to `Pause`: the state of the round after which the shard stands still.

    Attributes:
        epoch: the current epoch.
        round: the last decided round.
        clock: the clock after it.
        skipped: rounds skipped so far.
        lr: the learning rate, or its schedule, that the next step uses.
        pending: the ranks whose pushes for the next round wait.
        ledger: the pushes counted so far (`Ledger.to_dict`).
        rewound: the epoch in which all shards last rewound.
    """

    epoch: int
    round: int
    clock: Clock
    skipped: int
    lr: Rate
    pending: tuple[int, ...]
    ledger: dict[str, Any] = field(default_factory=dict)
    rewound: int = 0


@dataclass(frozen=True)
class Read:
    """Asks for arrays of the held shard: any of "params", "m", "v"."""

    token: str
    what: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Write:
    """Replaces arrays of the held shard, and its clock where given; the epoch rises to the one
    given, and pending pushes are refused.
    """

    token: str
    state: dict[str, Flat]
    clock: Clock | None = None
    epoch: int | None = None


def describe_replacement(what: str, round: int) -> str:
    """Return the sentence for what `Write` or `SetRate` replaced after a round."""
    return f"{what} was replaced after round {round}"


@dataclass(frozen=True)
class SetRate:
    """Replaces the learning rate of the held shard from the next step on."""

    token: str
    lr: Rate


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the held shard from an already averaged gradient; answered as a push is.

    `incarnation` and `round` make it one step however often it is sent.
    """

    token: str
    incarnation: int
    round: int
    gradients: Flat | None
    rejection: str | None = None


@dataclass(frozen=True)
class StepNorms:
    """The second phase of `Step`, as `TotalNorms` is of `Push`."""

    token: str
    square_sums: Array


_Worker = Join | CompletePush | Push | TotalNorms | Pull | Leave | WorkerDied


_Holder = Pause | CatchUp | Resume | Read | Write | SetRate | Step | StepNorms


Message = _Worker | _Holder | FileMessage | Describe
