"""A run that goes on elsewhere, as its shards tell of it, and its files, where they can be seen;
for the panel that `status --watch` shows.
"""

import os
from contextlib import suppress
from pathlib import Path

from distnadam.client.status import Status
from distnadam.errors import TrainingError
from distnadam.training.metrics_file import read_evaluations, read_steps
from distnadam.training.panel import RunView
from distnadam.training.run_record import NAME, read_events
from distnadam.training.steps import StepRecord

_LARGEST_BYTES = 64 << 20
"""Of a metrics file that is read again at each look."""


class ObservedRun:
    """What a panel shows of a running optimizer.

    Args:
        name: the optimizer's.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def view(self, status: Status) -> RunView:
        """Return it, after another look at the shards."""
        view = RunView(self._name)
        if status.checkpoint is not None:
            # it is a URL, or on another host, or its files are damaged
            with suppress(OSError, ValueError, LookupError, TypeError, TrainingError):
                _read(view, Path(status.checkpoint).parent)
        view.step, view.status = max(status.step, view.step), status
        view.steps_per_s = status.steps_per_s or 0.0
        view.recoveries = max(view.recoveries, status.recoveries)
        return view


def _read(view: RunView, directory: Path) -> None:
    path = directory / "metrics.csv"
    if not os.path.isfile(path) or path.stat().st_size > _LARGEST_BYTES:
        return
    seen = read_steps(path)
    columns = zip(seen.steps, seen.losses, seen.rates, seen.phases, strict=True)
    view.take([StepRecord(step, loss, rate, (), phases) for step, loss, rate, phases in columns])
    evaluated = read_evaluations(path)
    if evaluated:
        view.evaluated = evaluated[-1][0]
        view.metrics = {name: value for step, name, value in evaluated if step == view.evaluated}
    for event in read_events(directory / NAME):
        if event["event"] == "begin":
            view.steps = event["steps"]
        elif event["event"] == "recovery":
            view.recoveries += 1
            view.last_recovery = f"{event['who']}, step {event['step']}"
        elif event["event"] == "hosts":
            view.workers = {each["rank"]: each["host"] for each in event["workers"]}
