"""What watches a run: `fit` tells each callback what happened. The metrics file and the progress
display are two of them.
"""

import contextlib
import csv
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from distnadam.errors import TrainingError

_PLAIN_EVERY_S = 5.0


class Callback:
    """Does nothing; override what is wanted. `step` counts the steps done, from 1."""

    def on_begin(self, step: int, steps: int) -> None:
        """Training begins after `step` steps of `steps` in all."""

    def on_step(self, step: int, loss: float) -> None:
        """A step is done; `loss` is the mean over the ranks. Told for several steps at a time."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """The task has evaluated the parameters."""

    def on_save(self, step: int, path: Path | str) -> None:
        """A checkpoint is complete."""

    def on_message(self, text: str) -> None:
        """There is something the user should know."""

    def on_end(self) -> None:
        """Training ends, for whatever reason."""


class MetricsFile(Callback):
    """Writes rows of ``step,metric,value``; rows of steps after the one resumed from are dropped
    first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def on_begin(self, step: int, steps: int) -> None:
        """Open the file, keeping the rows up to `step`."""
        kept = (
            [row for row in read_metrics(self._path) if row[0] <= step]
            if self._path.exists()
            else []
        )
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            # line by line, so that a killed run keeps at least the rows up to its checkpoint;
            # closed by on_end
            self._file = open(new, "w", buffering=1, newline="", encoding="utf-8")  # noqa: SIM115
            for row in [("step", "metric", "value"), *kept]:
                self._write(*row)
            os.replace(new, self._path)
        except OSError as error:
            raise TrainingError(
                f"{self._path}: cannot be written: {error.strerror or error}"
            ) from error

    def on_step(self, step: int, loss: float) -> None:
        """Write the loss."""
        self._write(step, "loss", loss)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics."""
        for metric, value in metrics.items():
            self._write(step, metric, float(value))

    def on_end(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # was said when it was written
                self._file.close()

    def _write(self, *row: object) -> None:
        if self._file is not None:
            try:
                csv.writer(self._file).writerow(row)
            except OSError as error:
                raise TrainingError(
                    f"{self._path}: cannot be written: {error.strerror or error}"
                ) from error


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the whole rows of a metrics file; a last row cut short by a kill is left out."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            try:
                rows.append((int(row[0]), row[1], float(row[2])))
            except (ValueError, IndexError):
                continue
    return rows


class ProgressDisplay(Callback):
    """A bar with loss, steps per second and time left on a terminal; plain lines where there is
    none.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._told = time.monotonic()
        self._first = self._steps = 0

    def on_begin(self, step: int, steps: int) -> None:
        """Show the bar."""
        self._first, self._steps, self._began = step, steps, time.monotonic()
        if self._console.is_terminal:
            columns = [
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} steps/s"),
            ]
            self._bar = Progress(
                TextColumn("training"), *columns, TimeRemainingColumn(), console=self._console
            )
            self._task = self._bar.add_task(
                "training", total=steps, completed=step, loss="-", rate="-"
            )
            self._bar.start()

    def on_step(self, step: int, loss: float) -> None:
        """Move the bar, or say a line now and then."""
        now = time.monotonic()
        rate = (step - self._first) / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:.0f}")
        elif now - self._told >= _PLAIN_EVERY_S or step == self._steps:
            self._told = now
            self._console.print(
                f"step {step}/{self._steps}  loss {loss:.4f}  {rate:.0f} steps/s  "
                f"{(self._steps - step) / rate:.0f} s left"
            )

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say the metrics."""
        told = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._console.print(f"step {step}: {told}", highlight=False, markup=False)

    def on_message(self, text: str) -> None:
        """Say it."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def console(verbose: bool | str) -> Console | None:
    """Return where to show progress, on standard error; None for silence."""
    if verbose is False:
        return None
    return Console(
        file=sys.stderr, markup=False, emoji=False
    )  # paths and names are shown as they are
