"""What a task must offer `fit`, and what it is called. Knows nothing of the rest."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Task(Protocol):
    """A model and its data; any class with these methods is one.

    `init` is called once, in the process that called `fit`, also when a run is resumed, before the
    task is sent to the workers: what it keeps on `self`, such as the seed or the data, reaches
    them.
    """

    def init(self, seed: int) -> Any:
        """Return the initial parameters: any nesting of dict, list and tuple of arrays."""

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        """Return the batch of one rank at one step (from 0), the same for the same arguments."""

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        """Return the loss and its gradients, a tree like the parameters; `params` are read-only."""

    def evaluate(self, params: Any) -> Mapping[str, float]:
        """Return metrics of the parameters; called in the process that called `fit`."""


def run_directory(label: str) -> Path:
    """Return where a run of a task goes by default, whatever the task is called."""
    return (
        Path("runs") / f"{re.sub(r'[^A-Za-z0-9._-]', '-', label)}-{time.strftime('%Y%m%d-%H%M%S')}"
    )


def task_name(task: Task) -> str:
    """Return the task's `name` where it has one, else its class's."""
    return str(getattr(task, "name", type(task).__name__.lower()))
