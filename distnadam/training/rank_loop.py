"""What one rank of `fit` does: batch, gradients, step, until a given round.

It runs in a thread or in a Ray actor and does not know which.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any

from distnadam.backends.base import WorkerGroup
from distnadam.errors import (
    DistNadamError,
    LatePush,
    StaleEpoch,
    StructureError,
    TrainingError,
    Unrecoverable,
)
from distnadam.optimizer import DistNadam
from distnadam.training.steps import RankStep
from distnadam.training.task import Task
from distnadam.training.task_checks import is_deterministic, repeated
from distnadam.training.task_code import TaskCode
from distnadam.training.task_errors import error_of_task, task_errors
from distnadam.training.task_state import StatefulTask, state_of
from distnadam.worker import Worker


class RankLoop:
    """Trains one rank.

    Args:
        task: this rank's own copy of the user's task.
        worker: the rank's.
        world_size: how many ranks there are.
        first: the round that the task's own state is of.
        accumulate: of how many micro-batches each step is.
    """

    def __init__(
        self, task: Task, worker: Worker, world_size: int, first: int, accumulate: int = 1
    ) -> None:
        self._task = task
        self._worker = worker
        self._world_size = world_size
        self._state_round = first
        self._accumulate = accumulate
        self._seen: dict[int, RankStep] = {}
        self._samples = 0  # in a step's batches, as the first one shows
        self._is_unchecked = worker.rank == 0 and is_deterministic(task)

    def run(self, end: int) -> dict[int, RankStep]:
        """Train from the shards' present round to round `end` and return what each step was.

        Steps count from 0; those of an earlier call that raised come too. If the shards go back
        after a death, so does this loop.

        Raises:
            TrainingError: the task's code raised; the message names the rank and the step, a note
                holds the traceback.
            Unrecoverable: the task keeps state of its own, which is not that of the round.
        """
        params = self._pull()
        while (step := self._worker.round) < end:
            self._check_state(step)
            began = perf_counter()
            try:
                if self._accumulate == 1:
                    loss, gradients = self._loss_and_gradients(step, params)
                else:
                    loss, gradients = self._accumulated(step, params), None
                computed = perf_counter()
                try:
                    params = self._worker.step(gradients)
                except BaseException as error:
                    self._seen[step] = RankStep(loss, None)
                    if isinstance(error, StructureError):
                        raise TrainingError(f"{self._where(step)}: {error}") from error
                    raise
            except (StaleEpoch, LatePush):
                params = self._pull()
                continue
            ended, session = perf_counter(), self._worker.session
            pushed = min(max(computed, session.pushed_at), ended)
            times = computed - began, pushed - computed, ended - pushed
            norm = self._worker.gradient_norm
            self._seen[step] = RankStep(loss, session.lr, *times, self._samples, norm)
        seen, self._seen = self._seen, {}
        return seen

    def state(self) -> Any:
        """Return the task's own state after the shards' present round.

        Raises:
            TrainingError: the task's code raised.
            Unrecoverable: as `run`.
        """
        assert isinstance(self._task, StatefulTask)
        self._check_state(self._worker.round)
        with task_errors(f"worker {self._worker.rank}, state"):
            return state_of(self._task)

    def _accumulated(self, step: int, params: Any) -> float:
        """Have the worker sum a step's micro-batches, all of them; return their mean loss."""
        self._worker.discard()  # what the task's code left when it raised
        losses = []
        for number in range(self._accumulate):
            loss, gradients = self._loss_and_gradients(step, params, micro_batch=number)
            losses.append(loss)
            try:
                self._worker.accumulate(gradients)
            except StructureError as error:
                raise TrainingError(f"{self._where(step, number)}: {error}") from error
        return sum(losses) / len(losses)

    def _loss_and_gradients(self, step: int, params: Any, **which: int) -> tuple[float, Any]:
        batch_of: Callable[..., Any] = self._task.batch
        try:  # not by `task_errors`, which costs as much as a small step's rest
            if self._is_unchecked:
                return self._repeated(step, params, **which)
            batch = batch_of(step, self._worker.rank, self._world_size, **which)
            self._state_round = step + 1  # from here on, whatever becomes of the step
            if not self._samples:
                self._samples = samples_in(batch) * self._accumulate
            compute: Callable[..., tuple[float, Any]] = self._task.loss_and_gradients
            if scale := self._worker.session.loss_scale:  # known, as the round is
                loss, gradients = compute(params, batch, loss_scale=scale)
            else:
                loss, gradients = compute(params, batch)
            return float(loss), gradients
        except DistNadamError:
            raise
        except Exception as error:
            raise error_of_task(self._where(step, **which), error) from error

    def _repeated(self, step: int, params: Any, **which: int) -> tuple[float, Any]:
        """Do a step twice, and raise ConfigError unless it is the same."""
        scale = self._worker.session.loss_scale
        scaled = {"loss_scale": scale} if scale else {}
        compute: Callable[..., tuple[float, Any]] = self._task.loss_and_gradients

        def batch_of() -> Any:
            batch = self._task.batch(step, self._worker.rank, self._world_size, **which)
            self._state_round = step + 1
            return batch

        where = self._where(step, **which)
        batch, loss, gradients = repeated(
            self._task, where, batch_of, lambda batch: compute(params, batch, **scaled)
        )
        self._is_unchecked = False
        self._samples = samples_in(batch) * self._accumulate
        return float(loss), gradients

    def _where(self, step: int, micro_batch: int | None = None) -> str:
        """Return the place of an error."""
        part = "" if micro_batch is None else f", micro-batch {micro_batch}"
        return f"worker {self._worker.rank}, step {step}{part}"

    def _check_state(self, round: int) -> None:
        if self._state_round != round and isinstance(self._task, StatefulTask):
            raise Unrecoverable(
                f"worker {self._worker.rank}: its task's own state is of step {self._state_round}, "
                f"and the shards stand at step {round}"
            )

    def _pull(self) -> Any:
        """Return the parameters of the shards' present round, after any rewind."""
        while True:
            with suppress(StaleEpoch):
                return self._worker.pull()


def start_ranks(
    optimizer: DistNadam,
    task: Task,
    code: TaskCode,
    *,
    world_size: int,
    first: int,
    accumulate: int,
) -> WorkerGroup:
    """Start a worker for each rank, with a copy of the task, from round `first` on."""
    make = partial(
        _make_rank_loop,
        code=code,  # unpickled before the task, which needs it
        optimizer=optimizer,
        world_size=world_size,
        first=first,
        accumulate=accumulate,
    )
    return optimizer.team(make, task)


def _make_rank_loop(
    rank: int,
    task: Task,
    *,
    code: TaskCode | None,
    optimizer: DistNadam,
    world_size: int,
    first: int,
    accumulate: int,
) -> RankLoop:
    """Return the loop of a rank, in its process; `code` was unpickled before the task."""
    return RankLoop(task, optimizer.worker(rank), world_size, first, accumulate)


def samples_in(batch: Any) -> int:
    """Return the length of the first array of a batch: its samples, where that is its form; else 0.

    >>> samples_in({"images": np.zeros((32, 8)), "labels": np.zeros(32)}), samples_in(7)
    (32, 0)
    """
    while isinstance(batch, (dict, list, tuple)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    shape = getattr(batch, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape else 0
