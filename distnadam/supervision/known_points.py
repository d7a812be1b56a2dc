"""What all shards can go back to and what that would lose, as it is known at one moment. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distnadam.checkpoint.checkpoint_id import CheckpointId
from distnadam.places import shown
from distnadam.tensors.arrays import Flat


@dataclass(frozen=True, kw_only=True)
class RestorePoint:
    """One state to go back to: a checkpoint, or parameters with nothing behind them.

    Args:
        taken: when its state was taken, as `KnownPoints.now` counts.
        checkpoint: which one; None for parameters.
        params: by space; None for a checkpoint.
        is_whole: whether its manifest was written; before, a checkpoint may not be loadable.
    """

    taken: int
    checkpoint: CheckpointId | None = None
    params: Flat | None = None
    is_whole: bool = True

    def __str__(self) -> str:
        return "the first parameters" if self.checkpoint is None else shown(self.checkpoint.place)


@dataclass(frozen=True, kw_only=True)
class KnownPoints:
    """What can be gone back to, and what was replaced from outside, as known at one moment.

    Args:
        points: in the order in which their states were taken.
        now: counts events: snapshots, replacements, and whenever all shards went back.
        begun: when the last replacement began, which may be half done; 0: none ever did.
        what: that replacement, in words.
        half_done: when the first one began of those since the last that was completed.
        completed: when the last one began that all shards have taken, as its author may know.
        what_completed: that replacement, in words.
        went_back: when all shards last went back: a snapshot taken before that and written after
            it does not count.
    """

    points: tuple[RestorePoint, ...] = ()
    now: int = 0
    begun: int = 0
    what: str = ""
    half_done: int = 0
    completed: int = 0
    what_completed: str = ""
    went_back: int = 0

    @property
    def would_lose(self) -> str | None:
        """What going back would lose; None: nothing."""
        return self.what if self.begun and not self._are_whole(self.candidates()) else None

    @property
    def undoing_would_lose(self) -> str | None:
        """What going back would lose beside a last replacement that is half done."""
        is_kept = self._are_whole(self.candidates(undoing=True))
        return self.what_completed if self.completed and not is_kept else None

    @staticmethod
    def _are_whole(points: Sequence[RestorePoint]) -> bool:
        return any(point.is_whole for point in points)

    def candidates(self, *, undoing: bool = False) -> list[RestorePoint]:
        """Return what may be loaded, best first: what loses nothing that was replaced.

        Args:
            undoing: whether the last replacement is half done: it may be lost, and a snapshot that
                was taken since may mix both states.
        """
        least = self.completed if undoing else self.begun
        most = self.half_done if undoing and self.begun > self.completed else math.inf
        return [point for point in reversed(self.points) if least < point.taken < most]
