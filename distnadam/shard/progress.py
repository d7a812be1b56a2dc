"""How far a shard has come: the rounds it has decided, in which epoch and by whose pushes. Pure.

It is what a standby has beside the arrays, as `ShardControlState`; of the round in progress it
knows nothing.
"""

import math
from collections.abc import Collection, Mapping

from distnadam.errors import StaleEpoch
from distnadam.hyperparameters import NadamConfig
from distnadam.loss_scale import LossScale
from distnadam.nadam.norms import running_sum
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import (
    NO_NORM,
    Description,
    Outcome,
    Paused,
    PushNote,
    RoundResult,
)
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Load,
    Reason,
    Reconfigure,
    ReplicatedConfig,
    ReplicatedRound,
    ShardControlState,
)
from distnadam.shard.epochs import Epochs
from distnadam.shard.ledger import DIRECT
from distnadam.shard.membership import Membership
from distnadam.shard.round import Pushed, Round
from distnadam.shard.state import ShardState
from distnadam.tensors.arrays import Array


class Progress:
    """The state after the last decided round.

    Attributes:
        members: the workers, and the ledger of their pushes.
        epochs: the current epoch, and why each began.
        state: the arrays.
        clock: steps applied, and the momentum product.
        round: the last decided round.
        highest_round: the latest round ever decided, also before a rewind.
        skipped: rounds that applied no step.
        lr: the learning rate of the last applied step.
        revision: how often the hyper-parameters were replaced.
        applied_revision: theirs, of the last applied step.
        overrides: the learning rates and betas that were of the last applied step alone.
        loss_scale: the state of the scale of the next round's losses; None if none is kept.
        gradient_norm: of the last round's mean gradient, unclipped; `NO_NORM` if it was not needed.
        outcome: how the last round ended.
        rejection: why it applied no step, if so.
        counted: by rank, its last push that counted.
    """

    def __init__(
        self,
        members: Membership,
        epochs: Epochs,
        state: ShardState,
        scaling: LossScale | None = None,
    ) -> None:
        self._scaling = scaling
        self.loss_scale = None if scaling is None else scaling.first
        self.gradient_norm = NO_NORM
        self.members = members
        self.epochs = epochs
        self.state = state
        self.clock = Clock()
        self.round = 0
        self.highest_round = 0
        self.skipped = 0
        self.lr = 0.0
        self.revision = 0
        self.applied_revision = 0
        self.overrides = b""
        self.outcome: Outcome = "applied"
        self.rejection: str | None = None
        self.counted: dict[int, PushNote] = {}

    def take_step(self, clock: Clock, lr: float, stepped: Round) -> None:
        """Take the arrays, the clock and the learning rate of a round's step."""
        if not (stepped.in_place or self.state.in_place):
            self.state.swap()
        self.clock, self.lr = clock, lr
        self.applied_revision, self.overrides = self.revision, stepped.overrides

    def decide(
        self,
        outcome: Outcome,
        rejection: str | None,
        pushes: Mapping[int, Pushed],
        square_sums: Array | None = None,
        rounds: int = 1,
    ) -> dict[int, PushNote]:
        """Count the pushes of the next round, which ends so, and return them by rank.

        `square_sums` are its tensors', where clipping needed them. Of several `rounds` that were
        applied one after the other, by the same workers' pushes, these are the last one's, and no
        loss scale follows them.
        """
        self.gradient_norm = NO_NORM
        if square_sums is not None:
            self.gradient_norm = math.sqrt(running_sum(square_sums))
        if self.loss_scale is not None and self._scaling is not None:
            self.loss_scale = self._scaling.after(self.loss_scale, outcome)
        self.round += rounds
        self.highest_round = max(self.highest_round, self.round)
        self.skipped += outcome != "applied"
        self.outcome = outcome
        self.rejection = rejection
        notes = {rank: push.note for rank, push in pushes.items()}
        for rank, note in notes.items():
            self.members.ledger.count(rank, note.incarnation, self.round, rounds)
        self.counted |= notes
        return notes

    def record(self, counted: dict[int, PushNote]) -> ReplicatedRound:
        """Return the record of the last round, in which these pushes were counted."""
        return ReplicatedRound(
            round=self.round,
            skipped=self.skipped,
            outcome=self.outcome,
            rejection=self.rejection,
            counted=counted,
            lr=self.lr,
            active=self.state.active,
            clock=self.clock,
        )

    def next_members(self) -> tuple[int, ...]:
        """Return the ranks whose pushes make up the next round."""
        return self.members.needed(self.round + 1)

    def next_epoch(self, reason: Reason, epoch: int | None, who: str) -> StaleEpoch:
        """Begin an epoch, and return the error for messages of the one before."""
        before = self.epochs.now
        self.epochs.advance(reason, epoch)
        error = self.epochs.refusal(before, who, self.round)
        assert error is not None
        return error

    def record_config(self, config: NadamConfig) -> ReplicatedConfig | DetachStandby:
        """Return the record of these hyper-parameters. One that has a plain function, which does
        not travel as a record, ends the standby, so that it is filled anew with them.
        """
        if not config.is_plain:
            return DetachStandby()
        return ReplicatedConfig(config=config, revision=self.revision)

    def missed_by_copy(self) -> Reconfigure:
        """Return what may have come since a standby's copy of the control state was taken."""
        return Reconfigure(
            epoch=self.epochs.now,
            schedule=self.members.schedule,
            newest=self.members.ledger.newest_of_all(),
        )

    def control_state(self) -> ShardControlState:
        """Return all of this, but for the arrays, as a record."""
        return ShardControlState(
            epoch=self.epochs.now,
            round=self.round,
            skipped=self.skipped,
            clock=self.clock,
            lr=self.lr,
            active=self.state.active,
            outcome=self.outcome,
            rejection=self.rejection,
            ledger=self.members.ledger.to_dict(),
            schedule=self.members.schedule,
            history=self.epochs.history,
            counted=dict(self.counted),
            live_owners=self.members.live_owners,
            highest_round=self.highest_round,
            revision=self.revision,
            applied_revision=self.applied_revision,
            overrides=self.overrides,
            loss_scale=self.loss_scale,
        )

    def restore(self, record: ShardControlState) -> None:
        """Continue from a record; of workers, owners and rounds known here already none is lost."""
        self.clock = record.clock
        self.round = record.round
        self.highest_round = max(self.highest_round, record.highest_round, record.round)
        self.skipped = record.skipped
        self.lr = record.lr
        self.revision = record.revision
        self.applied_revision = record.applied_revision
        self.overrides = record.overrides
        self.gradient_norm = NO_NORM
        if self._scaling is not None:
            self.loss_scale = record.loss_scale or self._scaling.first
        self.outcome = record.outcome
        self.rejection = record.rejection
        self.counted = dict(record.counted)
        self.members.restore(record.ledger, record.schedule, record.live_owners)

    def load(self, record: ShardControlState, load: Load) -> None:
        """Continue from what a load has brought; its epoch has begun already."""
        self.restore(record)
        if load.control_state is not None:
            self.epochs.restore((*record.history, (load.epoch, "reconfigured")))
        self.members.schedule = load.schedule or self.members.schedule
        self.members.ledger.admit_all(load.newest)
        self.members.owners = {**load.live_owners, **self.members.owners}
        self.highest_round = max(self.highest_round, load.highest_round)

    def reconfigure(self, order: Reconfigure) -> None:
        """Begin the epoch of an order, with its membership."""
        self.epochs.advance("reconfigured", order.epoch)
        self.members.schedule = order.schedule
        self.members.ledger.admit_all(order.newest)

    def take_over(self, record: ShardControlState, reconfigure: Reconfigure) -> None:
        """Continue from a primary's record, in the epoch in which this shard replaces it."""
        self.restore(record)
        self.epochs.restore(record.history)
        self.epochs.advance("reconfigured", max(reconfigure.epoch, record.epoch + 1))
        self.members.schedule = reconfigure.schedule or self.members.schedule
        self.members.ledger.admit_all(reconfigure.newest)

    def result(self, *, want_parameters: bool) -> RoundResult:
        """Return the answer to a push or a pull."""
        return RoundResult(
            epoch=self.epochs.now,
            round=self.round,
            iterations=self.clock.iterations,
            outcome=self.outcome,
            rejection=self.rejection,
            lr=self.lr,
            buffer=self.state.active,
            parameters=self.state.seen if want_parameters else None,
            rewound=self.epochs.rewound,
            revision=self.applied_revision,
            loss_scale=0.0 if self.loss_scale is None else self.loss_scale.scale,
            gradient_norm=self.gradient_norm,
        )

    def description(self, *, pushed: Collection[int], config: NadamConfig) -> Description:
        """Return the answer to `Describe`, but for what only the machine or its host knows."""
        members = self.members
        needed = self.next_members()
        return Description(
            epoch=self.epochs.now,
            epoch_reason=self.epochs.reason,
            round=self.round,
            highest_round=self.highest_round,
            iterations=self.clock.iterations,
            skipped=self.skipped,
            stepped=members.ledger.last(DIRECT),
            config=config,
            revision=self.revision,
            applied_revision=self.applied_revision,
            overrides=self.overrides,
            loss_scale=0.0 if self.loss_scale is None else self.loss_scale.scale,
            gradient_norm=self.gradient_norm,
            members=needed,
            waiting_for=tuple(rank for rank in needed if rank not in pushed),
            left=tuple(sorted(members.left)),
            dead=tuple(sorted(members.dead)),
            given_up=tuple(sorted(members.given_up)),
            newest=members.ledger.newest_of_all(),
            live_owners=members.live_owners,
            schedule=members.schedule,
        )

    def paused(
        self, config: NadamConfig, pending: tuple[int, ...], *, awaits_norms: bool
    ) -> Paused:
        """Return the answer to `Pause`."""
        return Paused(
            epoch=self.epochs.now,
            round=self.round,
            clock=self.clock,
            skipped=self.skipped,
            config=config,
            revision=self.revision,
            pending=pending,
            ledger=self.members.ledger.to_dict(),
            rewound=self.epochs.rewound,
            awaits_norms=awaits_norms,
            loss_scale=self.loss_scale,
        )
