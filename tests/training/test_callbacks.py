"""The callbacks of `fit`: every event reaches all of them; the metrics file and the display."""

import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distnadam.errors import TrainingError
from distnadam.training.callbacks import (
    Callback,
    CallbackList,
    MetricsFile,
    ProgressDisplay,
    read_metrics,
)
from distnadam.training.history import History, Recorder

EVENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("on_begin", (3, 9)),
    ("on_step", (4, 0.5)),
    ("on_evaluate", (4, {"accuracy": 0.9})),
    ("on_save", (4, Path("step_00000004"))),
    ("on_message", ("resuming",)),
    ("on_end", ()),
]


class Recording(Callback):
    """Records every event, with its receiver."""

    def __init__(self, name: str, events: list[tuple[str, str, tuple[Any, ...]]]) -> None:
        self.name = name
        self.events = events

    def on_begin(self, step: int, steps: int) -> None:
        self.events.append((self.name, "on_begin", (step, steps)))

    def on_step(self, step: int, loss: float) -> None:
        self.events.append((self.name, "on_step", (step, loss)))

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append((self.name, "on_evaluate", (step, metrics)))

    def on_save(self, step: int, path: Path | str) -> None:
        self.events.append((self.name, "on_save", (step, path)))

    def on_message(self, text: str) -> None:
        self.events.append((self.name, "on_message", (text,)))

    def on_end(self) -> None:
        self.events.append((self.name, "on_end", ()))


def test_every_event_reaches_every_callback_in_order() -> None:
    assert {name for name, _ in EVENTS} == {
        name for name, _ in inspect.getmembers(Callback, inspect.isfunction)
    }
    seen: list[tuple[str, str, tuple[Any, ...]]] = []
    both = CallbackList([Recording("first", seen), Recording("second", seen)])
    for event, args in EVENTS:
        getattr(both, event)(*args)
    assert seen == [(name, event, args) for event, args in EVENTS for name in ("first", "second")]


def test_a_callback_may_override_nothing() -> None:
    for event, args in EVENTS:
        assert getattr(Callback(), event)(*args) is None


def test_a_metrics_file_keeps_the_rows_up_to_the_step_that_a_run_begins_at(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for first in (0, 2):
        file = MetricsFile(path)
        file.on_begin(first, 9)
        for step in range(first + 1, first + 4):
            file.on_step(step, float(first))
        file.on_evaluate(first + 3, {"accuracy": 0.5})
        file.on_end()
    assert read_metrics(path) == [
        (1, "loss", 0.0),
        (2, "loss", 0.0),
        (3, "loss", 2.0),
        (4, "loss", 2.0),
        (5, "loss", 2.0),
        (5, "accuracy", 0.5),
    ]


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"missing/metrics\.csv: cannot be written: No such"):
        MetricsFile(tmp_path / "missing" / "metrics.csv").on_begin(0, 9)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    output = io.StringIO()
    display = ProgressDisplay(Console(file=output, width=120))
    display.on_begin(0, 2)
    display.on_step(1, 0.75)  # too soon for a line
    display.on_step(2, 0.5)
    display.on_evaluate(2, {"accuracy": 0.9})
    display.on_message("saved to [runs]")
    display.on_end()
    first, *others = output.getvalue().splitlines()
    assert first.startswith("step 2/2  loss 0.5000  ")
    assert others == ["step 2: accuracy 0.9000", "saved to [runs]"]


def test_a_history_forgets_the_steps_that_are_trained_again() -> None:
    history = History(Path("run"), Path("run/metrics.csv"))
    recorder = Recorder(history)
    assert (history.metrics, history.steps_per_s) == ({}, 0.0)
    for step in (1, 2, 3):
        recorder.on_step(step, float(step))
        recorder.on_evaluate(step, {"accuracy": step / 10})
    recorder.on_begin(2, 9)
    assert (history.steps, history.losses) == ([1, 2], [1.0, 2.0])
    assert history.metrics == {"accuracy": 0.2}
