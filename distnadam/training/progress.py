"""The progress of a run on the terminal, or as lines in a log."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from typing_extensions import override

from distnadam.training.callbacks import Callback
from distnadam.training.history import History

_PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines of progress."""


class ProgressDisplay(Callback):
    """Shows loss, steps per second and time left: as a bar on a terminal, else as plain lines.

    Args:
        console: where to print.
        history: the run's record, which is brought up to date before.
    """

    def __init__(self, console: Console, history: History) -> None:
        self._console = console
        self._history = history
        self._spinner: Status | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._printed = time.monotonic()
        self._steps = 0

    @override
    def on_phase(self, text: str) -> None:
        if not self._console.is_terminal:
            self._print(text)
        elif self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._stop()
            self._spinner = self._console.status(text)
            self._spinner.start()

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self._stop()
        self._steps = steps
        self._printed = time.monotonic()
        if self._console.is_terminal and step < steps:
            columns = [
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} steps/s"),
            ]
            self._bar = Progress(
                TextColumn("{task.description}"),
                *columns,
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "training", total=steps, completed=step, loss="-", rate="-"
            )
            self._bar.start()

    @override
    def on_step(self, step: int, loss: float) -> None:
        now, rate = time.monotonic(), self._history.steps_per_s
        if self._bar is not None:
            self._bar.update(
                self._task,
                description="training",
                completed=step,
                loss=f"{loss:.4f}",
                rate=f"{rate:.1f}",
            )
        elif now - self._printed >= _PLAIN_EVERY_S or step == self._steps:
            self._printed = now
            left = f"  {(self._steps - step) / rate:.0f} s left" if rate > 0 else ""
            self._print(f"step {step}/{self._steps}  loss {loss:.4f}  {rate:.1f} steps/s{left}")

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._print(f"step {step}: {text}", highlight=False, markup=False)

    @override
    def on_message(self, text: str) -> None:
        self._print(text, highlight=False, markup=False, soft_wrap=True)

    @override
    def on_end(self) -> None:
        self._stop()

    def _stop(self) -> None:
        """End what moves on the terminal."""
        with contextlib.suppress(OSError):
            if self._spinner is not None:
                self._spinner.stop()
            if self._bar is not None:
                self._bar.stop()
        self._spinner = self._bar = None

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
