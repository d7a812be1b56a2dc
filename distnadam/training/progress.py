"""The progress of a run: a live panel on a terminal, or lines in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from typing_extensions import override

from distnadam.client.status import Status
from distnadam.errors import ConfigError
from distnadam.training.callbacks import Callback
from distnadam.training.history import History
from distnadam.training.panel import (
    RunView,
    above_a_free_line,
    duration,
    figure,
    render,
    step_line,
)
from distnadam.training.steps import StepRecord

Verbose = bool | int | Literal["auto"]
_PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines of progress."""
_REFRESH_PER_S = 1
"""How often the panel is drawn, which takes some milliseconds."""


class ProgressDisplay(Callback):
    """Shows a run: a live panel on a terminal that can, else a line every few seconds.

    Args:
        console: where to print.
        history: the run's record, which is brought up to date before.
        is_brief: whether to print a line for each evaluation, and nothing else.
    """

    def __init__(self, console: Console, history: History, *, is_brief: bool = False) -> None:
        self._console = console
        self._history = history
        self._is_brief = is_brief
        self._is_live = can_show_panel(console) and not is_brief
        self._view = RunView(history.checkpoint_dir.name)
        self._live: Live | None = None
        self._printed = time.monotonic()

    @override
    def on_phase(self, text: str) -> None:
        self._view.phase, self._view.since = text, time.monotonic()
        if self._is_live:
            self._show()
        else:
            self._print(text)

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self._view.step, self._view.steps, self._view.phase = step, steps, None
        self._printed = time.monotonic()
        if self._is_live and step < steps:
            self._show()

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        self._view.phase = None
        self._view.take(records)
        step, loss = records[-1].step, records[-1].loss
        now, rate, steps = time.monotonic(), self._history.steps_per_s, self._view.steps
        self._view.steps_per_s = rate
        if self._live is not None or self._is_brief:
            return
        if now - self._printed >= _PLAIN_EVERY_S or step == steps:
            self._printed = now
            words = [f"loss {figure(loss)}", f"{rate:.1f} steps/s"]
            if rate > 0 and steps:
                words.append(f"{duration((steps - step) / rate)} left")
            self._print(step_line(step, steps, words))

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self._view.metrics, self._view.evaluated = dict(metrics), step
        words = [f"{name} {figure(value)}" for name, value in metrics.items()]
        if self._is_brief:
            loss, rate = self._view.loss, self._history.steps_per_s
            words = [f"loss {figure(loss)}", *words, f"{rate:.1f} steps/s"]
            self._print(step_line(step, self._view.steps, words))
        elif words:
            self._print(f"step {step}: {'  '.join(words)}")

    @override
    def on_recovery(self, step: int, who: str, text: str) -> None:
        self._view.recoveries += 1
        self._view.last_recovery = f"{who}, step {step}"

    @override
    def on_status(self, status: Status, workers: Mapping[int, str]) -> None:
        self._view.status, self._view.workers = status, workers

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        self._view.saved = (step, time.monotonic())

    @override
    def on_message(self, text: str) -> None:
        self._print(text, soft_wrap=True)

    @override
    def on_end(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = (
                self._view.phase is not None
            )  # it came to nothing: no empty panel stays
            self._view.phase = None
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def _show(self) -> None:
        if self._live is None:
            with contextlib.suppress(OSError, ValueError):
                self._live = Live(
                    get_renderable=self._drawn,
                    console=self._console,
                    refresh_per_second=_REFRESH_PER_S,
                )
                self._live.start(refresh=True)

    def _drawn(self) -> RenderableType:
        panel = render(self._view)
        return panel if self._live is None else above_a_free_line(panel)

    def _print(self, text: str, **how: Any) -> None:
        """Print a line, above the panel; a log that cannot be written ends no run."""
        with contextlib.suppress(OSError, ValueError):
            self._console.print(text, highlight=False, markup=False, **how)


def can_show_panel(console: Console) -> bool:
    """Whether a console is a terminal that can draw over what it drew, with the panel's signs."""
    return console.is_terminal and not (console.is_dumb_terminal or console.options.ascii_only)


def display_of(verbose: Verbose, history: History) -> list[Callback]:
    """Return what shows a run on standard error, if anything.

    Args:
        verbose: 0 or False shows nothing, 1, True or "auto" a panel on a terminal and lines
            elsewhere, 2 a line for each evaluation.
        history: the run's.

    Raises:
        ConfigError: `verbose` is something else.
    """
    check_verbose(verbose)
    screen = console(verbose)
    return [] if screen is None else [ProgressDisplay(screen, history, is_brief=verbose == 2)]


def speaker(displays: Sequence[Callback]) -> Callable[[str], object]:
    """Return what shows a line to the user beside these displays, or on standard error if none."""
    for display in displays:
        return display.on_message
    return lambda text: print(text, file=sys.stderr, flush=True)


def check_verbose(verbose: Any) -> None:
    """Raise ConfigError unless it is one of Keras's values, or "auto"."""
    if verbose not in (0, 1, 2, "auto"):
        raise ConfigError(f'verbose must be 0, 1, 2 or "auto", got {verbose!r}')


def console(verbose: Verbose) -> Console | None:
    """Return a console on standard error, or None if nothing is to be shown."""
    if verbose == 0 or sys.stderr is None:
        return None
    # no markup, so that paths and names with brackets and colons are shown as they are
    return _Screen(file=sys.stderr, markup=False, emoji=False)


class _Screen(Console):
    """Breaks no line of what others write to standard error above the panel: a command or a URL in
    it is copied whole.
    """

    @override
    def print(self, *objects: Any, **how: Any) -> None:
        if objects and isinstance(objects[0], Text):  # as the panel's stand-in for stderr gives it
            how.setdefault("soft_wrap", True)
        super().print(*objects, **how)
