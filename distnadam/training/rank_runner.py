"""Runs all ranks of `fit` through a segment of rounds, replacing those that die, hang or fail.

A rank is tried again as long as the run makes new steps: `RetryBudget` counts. What a rank computes
is in `rank_loop`; shards are the supervisor's concern.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from distnadam.backends.base import WorkerGroup
from distnadam.errors import (
    DistNadamError,
    StepTimeout,
    TrainingError,
    Unrecoverable,
    WorkerLost,
)
from distnadam.optimizer import DistNadam
from distnadam.shield import shield
from distnadam.training.steps import RankStep

POLL_S = 0.1
"""Seconds between two checks for ranks whose process died."""
MAX_RECOVERIES = 3
"""Recoveries of one rank, or of the run, in a row without a new step, before the run fails."""


class RetryBudget:
    """Counts recoveries of each rank, and of the whole run, since the last new step.

    `total` counts all of them.
    """

    def __init__(self) -> None:
        self.total = 0
        self._since_progress = Counter[int | None]()
        self._reached = -1

    def count(self, step: int, error: Exception, rank: int | None = None) -> None:
        """Count one recovery of a rank, or of the whole run.

        Each has a budget of its own, since a host that dies takes all of its ranks down.

        Args:
            step: steps done so far.
            error: why the recovery is needed.
            rank: the rank to recover; None for the whole run.

        Raises:
            TrainingError: `MAX_RECOVERIES` are used up; `error` itself if it is one.
        """
        self.total += 1
        if step > self._reached:
            self._since_progress.clear()
        self._since_progress[rank] += 1
        self._reached = max(step, self._reached)
        if self._since_progress[rank] <= MAX_RECOVERIES:
            return
        if isinstance(error, TrainingError):
            raise error
        raise TrainingError(
            f"{MAX_RECOVERIES} recoveries in a row after step {step} brought no new step; "
            f"the last: {type(error).__name__}: {error}"
        ) from error


def restart_sentence(rank: int, step: int, error: Exception) -> str:
    """Return who is started again, after which step, and why."""
    what = str(error).removeprefix(f"worker {rank}: ")
    return f"worker {rank}, step {step}: {what}; it is started again"


class RankRunner:
    """Drives the ranks of a worker group segment by segment.

    Args:
        group: one `RankLoop` per rank.
        num_ranks: how many ranks there are.
        optimizer: the optimizer that they step.
        retries: counts the recoveries.
        on_recovery: receives who recovered, and a sentence for the user about it.
        stateful: whether a rank cannot be started anew without its task's own state.
    """

    def __init__(
        self,
        group: WorkerGroup,
        num_ranks: int,
        *,
        optimizer: DistNadam,
        retries: RetryBudget,
        on_recovery: Callable[[str, str], None],
        stateful: bool = False,
    ) -> None:
        self._stateful = stateful
        self._group = group
        self._num_ranks = num_ranks
        self._optimizer = optimizer
        self._retries = retries
        self._on_recovery = on_recovery
        self.segments = 0  # begun so far
        self._running: dict[int, int] = {}  # the end of its segment, by rank
        self._ended: dict[int, int] = {}  # the last incarnation that is known to be gone, by rank
        self._seen: dict[int, dict[int, RankStep]] = {}  # by step, then rank
        self._is_asked_for_state = False  # rank 0, which has not answered

    def begin(self, end: int) -> None:
        """Start every rank on the rounds up to `end`, exclusive, without waiting."""
        with shield:  # a Ctrl-C comes before the first is started, or after the last
            self._seen = {}
            self.segments += 1
            for rank in range(self._num_ranks):
                self._start(rank, end)

    def finish(self) -> dict[int, dict[int, RankStep]]:
        """Wait for the segment's end and return what each rank saw of each step.

        A rank whose process died has not reported what it did before. After a KeyboardInterrupt the
        call may be repeated.

        Raises:
            TrainingError: a rank failed, and retries brought no new step.
            DistNadamError: an error that no retry can mend.
        """
        while self._running:
            with shield:  # a result that was taken is dealt with before a Ctrl-C
                self._look()
        return self._seen

    def to_leave(self) -> frozenset[int]:
        """Return the ranks whose host is to be left."""
        return self._group.to_leave()

    def move(self, ranks: frozenset[int]) -> None:
        """Start ranks anew, on other hosts, between two segments.

        Raises:
            Unrecoverable: they have a state of their own, which a checkpoint holds.
        """
        if not ranks:
            return
        listed = ", ".join(map(str, sorted(ranks)))
        if self._stateful:
            raise Unrecoverable(f"rank {listed}: the host is to be left")
        with shield:
            self._on_recovery(f"rank {listed}", f"rank {listed}: moves, the host is to be left")
            newest = self._optimizer.shards.describe().newest
            for rank in sorted(ranks):
                self._group.end(rank)
                self._group.start(rank)
                self._ended[rank] = newest.get(rank, 0)

    def state(self) -> Any:
        """Return the task's own state in rank 0, between two segments.

        After a KeyboardInterrupt the call is to be repeated before the next segment.

        Raises:
            TrainingError: the task's code raised.
            Unrecoverable: it is gone with the rank's process.
        """
        if not self._is_asked_for_state:  # else by a call that a Ctrl-C ended
            with shield:
                self._group.call(0, "state")
                self._is_asked_for_state = True
        while True:
            with shield:  # the answer is not left for the segment that follows
                for _, result in self._group.results(POLL_S):
                    self._is_asked_for_state = False
                    if isinstance(result, WorkerLost):
                        raise Unrecoverable(f"{result}: its task's own state is gone") from result
                    if isinstance(result, Exception):
                        raise result
                    return result

    def _look(self) -> None:
        """Take the results that have come, for up to `POLL_S`, and replace who died."""
        for rank, result in self._group.results(POLL_S):
            if isinstance(result, Exception):
                self._recover(rank, result)
            elif rank in self._running:
                del self._running[rank]
                for step, seen in result.items():
                    self._seen.setdefault(step, {})[rank] = seen
        for rank, incarnation in self._optimizer.lost_ranks().items():
            if rank in self._running and self._ended.get(rank, -1) < incarnation:
                self._replace(rank, WorkerLost(f"worker {rank}: its process died"))

    def _start(self, rank: int, end: int) -> None:
        self._running[rank] = end
        self._group.call(rank, "run", end)

    def _recover(self, rank: int, error: Exception) -> None:
        """Replace or restart the ranks that an error of `rank` is about, or raise it."""
        if isinstance(error, WorkerLost):
            self._replace(rank, error)
        elif isinstance(error, StepTimeout):
            for late in sorted(self._optimizer.waiting_for()):
                if late != rank and late in self._running:
                    self._replace(late, error)
            self._start(rank, self._running[rank])
        elif isinstance(error, TrainingError) or not isinstance(error, DistNadamError):
            self._retries.count(self._optimizer.round, error, rank)
            self._on_recovery(f"worker {rank}", f"{error}; trying again")
            self._start(rank, self._running[rank])
        else:
            raise error

    def _replace(self, rank: int, error: Exception) -> None:
        self._retries.count(self._optimizer.round, error, rank)
        sentence = restart_sentence(rank, self._optimizer.round, error)
        self._on_recovery(f"worker {rank}", sentence)
        self._group.end(rank)
        # a death is often reported twice, by the backend and by the shards, which may be late: the
        # second report must not end the successor
        gone = self._optimizer.shards.describe().newest.get(rank, 0)
        self._group.start(rank)
        self._start(rank, self._running[rank])
        self._ended[rank] = gone
