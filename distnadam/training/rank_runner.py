"""All ranks of `fit` as one: runs a segment to its end, replacing those that die, hang or fail, as
long as steps are made.
"""

from collections import Counter
from collections.abc import Callable

from distnadam.backends.base import WorkerGroup
from distnadam.errors import DistNadamError, StepTimeout, TrainingError, WorkerLost
from distnadam.optimizer import DistNadam

POLL_S = 0.1
"""Seconds between two looks for ranks whose process died."""
MOST_RECOVERIES = 3
"""Recoveries of one rank in a row, with no new step between them, after which a run is given up."""


class RetryBudget:
    """Counts recoveries since the last new step, of each rank and of the whole run, and gives up
    after `MOST_RECOVERIES` of one.
    """

    def __init__(self) -> None:
        self.total = 0
        self._since, self._reached = Counter[int | None](), -1

    def count(self, step: int, error: Exception, rank: int | None = None) -> None:
        """Take that a rank, or else the whole run, failed after `step` steps; raise where it did so
        too often.

        Ranks count apart, since a host takes all of its ranks along.
        """
        self.total += 1
        if step > self._reached:
            self._since.clear()
        self._since[rank] += 1
        self._reached = max(step, self._reached)
        if self._since[rank] <= MOST_RECOVERIES:
            return
        if isinstance(error, TrainingError):
            raise error
        told = (
            f"{MOST_RECOVERIES} recoveries in a row after step {step} brought no new step; "
            f"the last: {type(error).__name__}: {error}"
        )
        raise TrainingError(told) from error


class RankRunner:
    """The members of a team, driven segment by segment.

    Args:
        team: one member per rank.
        size: ranks.
        optimizer: the one they step.
        recoveries: counts what had to be done again.
        tell: says a sentence to the user.
    """

    def __init__(
        self,
        team: WorkerGroup,
        size: int,
        optimizer: DistNadam,
        recoveries: RetryBudget,
        tell: Callable[[str], None],
    ) -> None:
        self._team, self._size, self._optimizer, self._recoveries, self._tell = (
            team,
            size,
            optimizer,
            recoveries,
            tell,
        )
        self._running: dict[int, int] = {}
        self._replaced: dict[int, int] = {}
        self._losses: dict[int, dict[int, float]] = {}

    def begin(self, end: int) -> None:
        """Have every rank train until `end` rounds are decided."""
        self._losses = {}
        for rank in range(self._size):
            self._run(rank, end)

    def finish(self) -> dict[int, float]:
        """Wait for the segment's end and return the mean losses by step, over the ranks that lived
        to tell theirs.

        May be called again where Ctrl-C interrupted it.

        Raises:
            TrainingError: a rank's code failed, or its process died, and trying again brought no
                new step.
            DistNadamError: what no trying again can mend.
        """
        while self._running:
            for rank, result in self._team.results(POLL_S):
                if isinstance(result, Exception):
                    self._failed(rank, result)
                elif rank in self._running:
                    del self._running[rank]
                    for step, loss in result.items():
                        self._losses.setdefault(step, {})[rank] = loss
            for rank, incarnation in self._optimizer.lost_ranks().items():
                if rank in self._running and self._replaced.get(rank, -1) < incarnation:
                    self._replaced[rank] = incarnation
                    self._replace(rank, WorkerLost(f"worker {rank}: its process died"))
        return {step: sum(each.values()) / len(each) for step, each in sorted(self._losses.items())}

    def _run(self, rank: int, end: int) -> None:
        self._running[rank] = end
        self._team.call(rank, "run", end)

    def _failed(self, rank: int, error: Exception) -> None:
        if isinstance(error, WorkerLost):
            self._replace(rank, error)
        elif isinstance(error, StepTimeout):
            for late in sorted(self._optimizer.waiting_for()):
                if late != rank and late in self._running:
                    self._replace(late, error)
            self._run(rank, self._running[rank])
        elif isinstance(error, TrainingError) or not isinstance(error, DistNadamError):
            self._recoveries.count(self._optimizer.round, error, rank)
            self._tell(f"{error}; trying again")
            self._run(rank, self._running[rank])
        else:
            raise error

    def _replace(self, rank: int, error: Exception) -> None:
        self._recoveries.count(self._optimizer.round, error, rank)
        self._tell(f"{error}; worker {rank} is started anew")
        end = self._running[rank]
        self._team.replace(rank)
        self._run(rank, end)
