"""What one rank of `fit` does: batches, gradients, steps, until a round it is told. In a thread or
an actor, it does not know.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distnadam.errors import DistNadamError, LatePush, StaleEpoch, StructureError, TrainingError
from distnadam.training.task import Task
from distnadam.worker import Worker


class RankLoop:
    """One rank with its task and its worker."""

    def __init__(self, task: Task, worker: Worker, world_size: int) -> None:
        self._task, self._worker, self._world_size = task, worker, world_size

    def run(self, end: int) -> dict[int, float]:
        """Train until `end` rounds are decided, from wherever the shards stand, and return the
        losses by step, from 0.

        Where the shards go back after a death, so does this.

        Raises:
            TrainingError: the task's own code raised; the message names the rank and the step, a
                note holds the traceback.
        """
        params, losses = self._pull(), {}
        while (step := self._worker.round) < end:
            where = f"worker {self._worker.rank}, step {step}"
            with task_errors(where):
                batch = self._task.batch(step, self._worker.rank, self._world_size)
                loss, gradients = self._task.loss_and_gradients(params, batch)
                losses[step] = float(loss)
            try:
                params = self._worker.step(gradients)
            except StructureError as error:
                raise TrainingError(f"{where}: {error}") from error
            except (StaleEpoch, LatePush):
                params = self._pull()
        return losses

    def _pull(self) -> Any:
        """Return the parameters as they are now, wherever the shards have gone."""
        while True:
            with suppress(StaleEpoch):
                return self._worker.pull()


@contextmanager
def task_errors(where: str) -> Iterator[None]:
    """Turn what the task's code raises, or returns that is of no use, into a TrainingError that
    says where.
    """
    try:
        yield
    except DistNadamError:
        raise
    except Exception as error:
        wrapped = TrainingError(f"{where}: the task raised {type(error).__name__}: {error}")
        wrapped.add_note(
            traceback.format_exc()
        )  # a cause does not survive the way from another process
        raise wrapped from error
