"""Gradients on their way to a shard: one rank's for a round, a slice of them, a group's sum."""

from dataclasses import dataclass

from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.tensors.arrays import NAME_OF, Flat


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class PushNote:
    """What identifies a push to other shards.

    Attributes:
        incarnation: the worker's.
        round: the round that it is for.
        dtypes: by space, the dtype of the gradients in the worker's memory; None if rejected.
        rejection: why it has no gradients, if so.
        settings: what else its rank says of the round.
    """

    incarnation: int
    round: int
    dtypes: dict[str, str] | None
    rejection: str | None = None
    settings: RoundSettings = ORDINARY


@dataclass(frozen=True)
class CompletePush:
    """The push of a replaced worker counts after all, since another shard has counted it.

    `gradients` are the sender's, if it has them; else the shard's host fills them in from the
    worker's memory. They are needed if the shard does not have the push.
    """

    rank: int
    note: PushNote
    gradients: Flat | None = None


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class Push:
    """One rank's gradients for one round, or the rejection that says why there are none.

    `gradients` are this shard's ranges in the spaces' dtypes or in half precision; None beside a
    rejection. They are not copied: the sender must not change them until the push is answered.
    `slices` is the number of its `PushSlice`s that were sent before it, `settings` what else the
    rank says of the round.
    """

    epoch: int
    rank: int
    incarnation: int
    round: int
    gradients: Flat | None
    rejection: str | None = None
    want_parameters: bool = False
    slices: int = 0
    settings: RoundSettings = ORDINARY

    @property
    def note(self) -> PushNote:
        """What other shards need to know of it."""
        dtypes = (
            None
            if self.gradients is None
            else {space: NAME_OF[array.dtype] for space, array in self.gradients.items()}
        )
        return PushNote(
            incarnation=self.incarnation,
            round=self.round,
            dtypes=dtypes,
            rejection=self.rejection,
            settings=self.settings,
        )


@dataclass(frozen=True, kw_only=True)
class PushSlice:
    """Gradients of a push that is still to come, sent ahead while the rest is computed.

    They are only kept: they count where the push says so, by their number. Never answered.

    Attributes:
        epoch: as of the push.
        rank: as of the push.
        incarnation: as of the push.
        round: as of the push.
        space: the space of the elements.
        begin: the first of them, in the whole model.
        end: the first behind them.
    """

    epoch: int
    rank: int
    incarnation: int
    round: int
    space: str
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class GroupPush:
    """The pushes of a group's ranks for one round as one; they count together or not at all.

    Refused with GroupChanged, at once or later, where they must be sent singly.

    Attributes:
        epoch: as of each push.
        round: as of each push.
        members: what identifies each push, by rank; they are all of the group that the round needs.
        gradients: the sum of this shard's ranges in rank order, in the spaces' dtypes, never
            narrower; None if a push is rejected. As of `Push`, they are not copied.
        want_parameters: as of each push.
    """

    epoch: int
    round: int
    members: dict[int, PushNote]
    gradients: Flat | None
    want_parameters: bool = False

    def holds(self, rank: int, incarnation: int) -> bool:
        """Whether that worker's push is in it."""
        note = self.members.get(rank)
        return note is not None and note.incarnation == incarnation
