"""What one rank of `fit` does: batches, gradients, steps, for as many rounds as it is told. In a thread or an actor, it does not know."""

import traceback
from typing import Any

from distnadam.errors import DistNadamError, TrainingError
from distnadam.training.task import Task
from distnadam.worker import Worker


class Member:
    """One rank with its task and its worker."""

    def __init__(self, task: Task, worker: Worker, world_size: int) -> None:
        self._task, self._worker, self._world_size = task, worker, world_size

    def run(self, begin: int, end: int) -> list[float]:
        """Train steps [begin, end) and return their losses.

        Raises:
            TrainingError: the task's own code raised; the message names the rank and the step, a note holds the traceback.
        """
        params = self._worker.pull()
        losses = []
        for step in range(begin, end):
            loss, gradients = self._compute(step, params)
            params = self._worker.step(gradients)
            losses.append(float(loss))
        return losses

    def _compute(self, step: int, params: Any) -> tuple[float, Any]:
        rank = self._worker.rank
        try:
            return self._task.loss_and_gradients(params, self._task.batch(step, rank, self._world_size))
        except DistNadamError:
            raise
        except Exception as error:
            wrapped = TrainingError(f"worker {rank}, step {step}: the task raised {type(error).__name__}: {error}")
            wrapped.add_note(traceback.format_exc())  # a cause does not survive the way from another process
            raise wrapped from error
