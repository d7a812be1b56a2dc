"""The file metrics.csv of a run: written as the run goes on, and read."""

import contextlib
import csv
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from typing_extensions import override

from distnadam.checkpoint.storage.local import is_open_at
from distnadam.errors import TrainingError
from distnadam.training.callbacks import Callback
from distnadam.training.steps import Phases, StepRecord, in_words

COLUMNS = ("step", "metric", "value", "lr", "seconds", "ranks", *Phases._fields)
_LENGTHS = (3, 6, len(COLUMNS))
"""Of rows; older files have fewer columns."""


class MetricsFile(Callback):
    """Writes the losses and metrics as CSV rows of `COLUMNS`.

    `lr` is the learning rate of the step, `seconds` the time trained so far, and `ranks` those
    whose mean a loss is, such as "0-3"; then come the seconds of its `Phases`. Metrics of an
    evaluation have neither. Rows after the step at which a run begins are dropped first, so a
    resumed run leaves one record.

    Args:
        path: the file; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._began: float | None = None

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self.on_end()
        kept = []
        if os.path.exists(self._path):
            kept = [row for row in _rows(self._path) if int(row[0]) <= step]
        if self._began is None:
            self._began = time.monotonic() - max((_seconds(row) for row in kept), default=0.0)
        new = self._path.with_name(f".{self._path.name}.new")
        with self._write_errors():
            # line-buffered, so that a killed run keeps at least the rows up to its checkpoint
            self._file = new.open("w", buffering=1, newline="", encoding="utf-8")
            for row in [COLUMNS, *kept]:
                self._write(*row)
            os.replace(new, self._path)

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        if self._file is None:
            return
        rows, elapsed, rate, seen = list[str](), self._elapsed(), math.nan, ""
        whose: tuple[int, ...] | None = None
        waited, applied, between = math.nan, math.nan, ""
        for step, loss, lr, ranks, (compute, push, wait, apply, pull), _, _ in records:
            if lr != rate or ranks != whose:  # seldom
                rate, whose, seen = lr, ranks, f"{lr!r},{elapsed},{in_words(ranks)}"
            if apply != applied or wait != waited:  # where there are several ranks
                waited, applied, between = wait, apply, f"{wait:.7f},{apply:.7f}"
            rows.append(
                f"{step},loss,{loss!r},{seen},{compute:.7f},{push:.7f},{between},{pull:.7f}\r\n"
            )
        with self._write_errors():
            self._file.write("".join(rows))

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            self._write(step, metric, float(value), "", self._elapsed(), *[""] * 6)

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        if self._file is not None and not is_open_at(self._path, self._file.fileno()):
            with self._write_errors():  # it was removed, or moved, with its directory
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.close()
                self._file = self._path.open("a", buffering=1, newline="", encoding="utf-8")
                is_new = self._file.tell() == 0  # an editor, too, puts another file in its place
            if is_new:
                self._write(*COLUMNS)

    @override
    def on_end(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # reported when it was written
                self._file.close()
            self._file = None

    def _elapsed(self) -> str:
        return "" if self._began is None else f"{time.monotonic() - self._began:.3f}"

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
    return [(int(row[0]), row[1], float(row[2])) for row in _rows(path)]


@dataclass(frozen=True)
class StepTimes:
    """Columns of the steps of a run, each with one item a step.

    Attributes:
        steps: counted from 1.
        losses: NaN where nobody reported one.
        rates: learning rates.
        seconds: the time trained when the step was reported, which many are at once.
        phases: seconds of each; NaN where they are not known.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    phases: list[Phases] = field(default_factory=list)


def read_steps(path: Path) -> StepTimes:
    """Return all that a metrics file says of steps, without incomplete rows."""
    found = StepTimes()
    for row in _rows(path):
        if _is_step(row):
            found.steps.append(int(row[0]))
            found.losses.append(float(row[2]))
            found.rates.append(_number(row[3]))
            found.seconds.append(_number(row[4]))
            found.phases.append(Phases(*map(_number, row[6:11])))
    return found


def read_evaluations(path: Path) -> list[tuple[int, str, float]]:
    """Return the rows (step, metric, value) of evaluations."""
    return [(int(row[0]), row[1], float(row[2])) for row in _rows(path) if not _is_step(row)]


def evaluation_at(path: Path, step: int) -> dict[str, float]:
    """Return the metrics of the evaluation after a step; {} if the file has none."""
    if not os.path.isfile(path):
        return {}
    return {row[1]: float(row[2]) for row in _rows(path) if int(row[0]) == step and not row[3]}


def say_if_anew(path: Path, say: Callable[[str], None]) -> None:
    """Say it, if a metrics file is of a run that saved nothing, as one begins from its start."""
    if os.path.isfile(path):
        steps = [int(row[0]) for row in _rows(path)]
        reached = f"reached step {max(steps)}" if steps else "made no step"
        say(f"beginning anew: the run before in {path.parent} {reached} and saved no checkpoint")


def _rows(path: Path) -> list[list[str]]:
    """Return the rows that are whole; the last one may have been cut off, others have no more than
    a value, and one that was damaged is left out.

    Raises:
        TrainingError: the file cannot be read.
    """
    rows = []
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.reader(file):
                with contextlib.suppress(ValueError, IndexError):
                    float(row[2]), int(row[0])
                    if len(row) in _LENGTHS:
                        rows.append(row + [""] * (len(COLUMNS) - len(row)))
    except csv.Error:  # a quote without its other took in all that follows
        pass
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror or error}") from error
    return rows


def _is_step(row: list[str]) -> bool:
    """Whether a row is a step's; one of an evaluation has no rate, and a time in newer files."""
    return row[1] == "loss" and (row[3] != "" or row[4] == "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _seconds(row: list[str]) -> float:
    try:
        return float(row[4])
    except ValueError:
        return 0.0
