"""The callbacks of `fit`: the interface, the metrics file, and the progress display.

They observe a run; nothing that they do or return changes it.
"""

import contextlib
import csv
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from distnadam.errors import TrainingError

_PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines of progress."""


class Callback:
    """Receives the events of a run; each method does nothing until it is overridden.

    A callback runs in the process and thread that called `fit`. `step` counts the steps done, so it
    is 1 after the first.
    """

    def on_begin(self, step: int, steps: int) -> None:
        """Training begins, or begins again, after `step` of `steps` steps."""

    def on_step(self, step: int, loss: float) -> None:
        """A step is done; `loss` is the mean over the ranks. Calls come in bursts of steps."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """The task has evaluated the parameters after `step` steps."""

    def on_save(self, step: int, path: Path | str) -> None:
        """A checkpoint is complete; `path` is a string if it is a URL."""

    def on_message(self, text: str) -> None:
        """Something happened that the user should know, such as a recovery."""

    def on_end(self) -> None:
        """Training ends, by success, error or Ctrl-C."""


class CallbackList(Callback):
    """Passes each event to several callbacks, in order.

    Args:
        callbacks: what to call.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    @override
    def on_begin(self, step: int, steps: int) -> None:
        for callback in self._callbacks:
            callback.on_begin(step, steps)

    @override
    def on_step(self, step: int, loss: float) -> None:
        for callback in self._callbacks:
            callback.on_step(step, loss)

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_evaluate(step, metrics)

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        for callback in self._callbacks:
            callback.on_save(step, path)

    @override
    def on_message(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_message(text)

    @override
    def on_end(self) -> None:
        for callback in self._callbacks:
            callback.on_end()


class MetricsFile(Callback):
    """Writes the losses and metrics as CSV rows of ``step,metric,value``.

    Rows after the step at which a run begins are dropped first, so a resumed run leaves one record.

    Args:
        path: the file; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    @override
    def on_begin(self, step: int, steps: int) -> None:
        kept = []
        if self._path.exists():
            kept = [row for row in read_metrics(self._path) if row[0] <= step]
        new = self._path.with_name(f".{self._path.name}.new")
        with self._write_errors():
            # line-buffered, so that a killed run keeps at least the rows up to its checkpoint
            self._file = new.open("w", buffering=1, newline="", encoding="utf-8")
            for row in [("step", "metric", "value"), *kept]:
                self._write(*row)
            os.replace(new, self._path)

    @override
    def on_step(self, step: int, loss: float) -> None:
        self._write(step, "loss", loss)

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            self._write(step, metric, float(value))

    @override
    def on_end(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # reported when it was written
                self._file.close()

    def _write(self, *row: object) -> None:
        if self._file is not None:
            with self._write_errors():
                csv.writer(self._file).writerow(row)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._path}: cannot be written: {error.strerror or error}"
            ) from error


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the rows (step, metric, value) of a metrics file, without incomplete ones."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            try:
                rows.append((int(row[0]), row[1], float(row[2])))
            except (ValueError, IndexError):
                continue
    return rows


class ProgressDisplay(Callback):
    """Shows loss, steps per second and time left: as a bar on a terminal, else as plain lines.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._printed = self._began
        self._first_step = 0
        self._steps = 0

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self._first_step = step
        self._steps = steps
        self._began = time.monotonic()
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

    @override
    def on_step(self, step: int, loss: float) -> None:
        now = time.monotonic()
        rate = (step - self._first_step) / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:.0f}")
        elif now - self._printed >= _PLAIN_EVERY_S or step == self._steps:
            self._printed = now
            self._print(
                f"step {step}/{self._steps}  loss {loss:.4f}  {rate:.0f} steps/s  "
                f"{(self._steps - step) / rate:.0f} s left"
            )

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._print(f"step {step}: {text}", highlight=False, markup=False)

    @override
    def on_message(self, text: str) -> None:
        self._print(text, highlight=False, markup=False, soft_wrap=True)

    @override
    def on_end(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None

    def _print(self, text: str, **how: Any) -> None:
        """Print a line; a log that cannot be written ends no run."""
        with contextlib.suppress(OSError, ValueError):
            self._console.print(text, **how)


def console(verbose: bool | str) -> Console | None:
    """Return a console on standard error, or None if `verbose` is False."""
    if verbose is False or sys.stderr is None:
        return None
    # no markup, so that paths and names with brackets and colons are shown as they are
    return Console(file=sys.stderr, markup=False, emoji=False)
