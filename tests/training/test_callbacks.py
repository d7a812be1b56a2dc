"""The callbacks of `fit`: every event reaches all of them; the metrics file and the display."""

import csv
import gc
import inspect
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distnadam import fit
from distnadam.client.status import ShardStatus, Status
from distnadam.errors import ConfigError, RayLost, Rewound, ShardLost, TrainingError, Unrecoverable
from distnadam.training.callbacks import Callback, CallbackList
from distnadam.training.history import History, Recorder
from distnadam.training.metrics_file import MetricsFile, evaluation_at, read_metrics
from distnadam.training.panel import Trend, figure
from distnadam.training.progress import ProgressDisplay
from distnadam.training.run_handle import RunHandle
from distnadam.training.steps import Phases, RankStep, StepRecord
from distnadam.training.tasks.digits import Digits

STATUS = Status(
    name=None,
    step=4,
    round=4,
    skipped=0,
    lr=0.1,
    steps_per_s=None,
    shards=(ShardStatus(index=0, node="this process", state="waiting"),),
    workers={0: "computing"},
    replicas=0,
    checkpoint=None,
    at=0.0,
)
EVENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("on_begin", (3, 9)),
    ("on_records", ([StepRecord(step=4, loss=0.5, lr=0.1, ranks=(0, 1))],)),
    ("on_record", (StepRecord(step=4, loss=0.5, lr=0.1, ranks=(0, 1)),)),
    ("on_step", (4, 0.5)),
    ("on_evaluate", (4, {"accuracy": 0.9})),
    ("on_save", (4, Path("step_00000004"))),
    ("on_recovery", (4, "worker 1", "worker 1: its process died")),
    ("on_status", (STATUS, {0: "this process"})),
    ("on_message", ("resuming",)),
    ("on_phase", ("starting Ray",)),
    ("on_end", ()),
]


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step=step, loss=loss, lr=0.1, ranks=(0, 1))


class Recording(Callback):
    """Records every event, with its receiver."""

    def __init__(self, name: str, events: list[tuple[str, str, tuple[Any, ...]]]) -> None:
        self.name = name
        self.events = events

    def on_begin(self, step: int, steps: int) -> None:
        self.events.append((self.name, "on_begin", (step, steps)))

    def on_records(self, records: Sequence[StepRecord]) -> None:
        self.events.append((self.name, "on_records", (records,)))

    def on_record(self, record: StepRecord) -> None:
        self.events.append((self.name, "on_record", (record,)))

    def on_step(self, step: int, loss: float) -> None:
        self.events.append((self.name, "on_step", (step, loss)))

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append((self.name, "on_evaluate", (step, metrics)))

    def on_save(self, step: int, path: Path | str) -> None:
        self.events.append((self.name, "on_save", (step, path)))

    def on_recovery(self, step: int, who: str, text: str) -> None:
        self.events.append((self.name, "on_recovery", (step, who, text)))

    def on_status(self, status: Status, workers: Mapping[int, str]) -> None:
        self.events.append((self.name, "on_status", (status, workers)))

    def on_message(self, text: str) -> None:
        self.events.append((self.name, "on_message", (text,)))

    def on_phase(self, text: str) -> None:
        self.events.append((self.name, "on_phase", (text,)))

    def on_end(self) -> None:
        self.events.append((self.name, "on_end", ()))


def test_every_event_reaches_every_callback_in_order() -> None:
    methods = {name for name, _ in inspect.getmembers(Callback, inspect.isfunction)}
    others = {"state", "load_state", "stops_again", "_hears"}
    assert {name for name, _ in EVENTS} == methods - others
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
            file.on_records([record(step, float(first))])
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


def test_what_was_damaged_of_a_metrics_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.on_begin(0, 9)
    file.on_records([record(step, 0.5) for step in range(1, 5)])
    file.on_end()
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = (b"\xff" + lines[2][1:], b'"' + lines[4].rstrip() * 10_000)
    path.write_bytes(b"".join([*lines[:2], damaged[0], lines[3], damaged[1]]))
    assert read_metrics(path) == [(1, "loss", 0.5), (3, "loss", 0.5)]
    assert evaluation_at(path, 3) == {}
    file.on_begin(3, 9)
    file.on_end()
    assert len(read_metrics(path)) == 2
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainingError, match=r"metrics\.csv: cannot be read: Is a directory"):
        read_metrics(path)


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"missing/metrics\.csv: cannot be written: No such"):
        MetricsFile(tmp_path / "missing" / "metrics.csv").on_begin(0, 9)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    output = io.StringIO()
    history = History(Path("run"), Path("run/metrics.csv"))
    display = ProgressDisplay(Console(file=output, width=120), history)
    display.on_begin(0, 2)
    display.on_records([record(1, 0.75)])  # too soon for a line
    display.on_records([record(2, 0.5)])
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
        recorder.on_records([record(step, float(step))])
        recorder.on_evaluate(step, {"accuracy": step / 10})
    recorder.on_begin(2, 9)
    assert (history.steps, history.losses) == ([1, 2], [1.0, 2.0])
    assert history.metrics == {"accuracy": 0.2}
    assert len(history.phases) == 2


def test_a_history_keeps_no_object_for_each_step_that_the_garbage_collector_looks_at() -> None:
    history = History(Path("run"), Path("run/metrics.csv"))
    seconds = (0.001, 0.002, 0.003, 0.004, 0.005)
    recorder = Recorder(history)
    gc.collect()
    before = len(gc.get_objects())
    for begin in range(0, 10_000, 100):
        steps = range(begin + 1, begin + 101)
        recorder.on_records([StepRecord(s, 0.5, 0.1, (0, 1), Phases(*seconds)) for s in steps])
    gc.collect()
    assert len(gc.get_objects()) - before < 1000
    assert history.phases == [Phases(*seconds)] * 10_000


class Broken(Callback):
    """Raises at one event."""

    def __init__(self, event: str) -> None:
        self.heard: list[str] = []
        self._broken = event

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hear(*args: Any) -> None:
            self.heard.append(name)
            if name == self._broken:
                raise ZeroDivisionError("boom")

        return hear


@pytest.mark.parametrize("event", [name for name, _ in EVENTS])
def test_a_callback_that_raises_is_named_and_the_others_hear_all(event: str) -> None:
    seen: list[tuple[str, str, tuple[Any, ...]]] = []
    broken = Broken(event)
    callbacks = CallbackList([broken, Recording("other", seen)])
    for name, args in EVENTS * 2:
        getattr(callbacks, name)(*args)
    assert [name for _, name, _ in seen] == [name for name, _ in EVENTS] * 2
    assert broken.heard[-1] == event, "it hears nothing after that"
    assert isinstance(callbacks.failure, TrainingError)
    assert f"callback Broken.{event}" in str(callbacks.failure)
    assert "it raised ZeroDivisionError: boom" in str(callbacks.failure)
    assert "in hear" in callbacks.failure.__notes__[0]


def test_a_ctrl_c_in_a_callback_keeps_no_event_from_the_others() -> None:
    class Impatient(Callback):
        def on_step(self, step: int, loss: float) -> None:
            raise KeyboardInterrupt

    seen: list[tuple[str, str, tuple[Any, ...]]] = []
    callbacks = CallbackList([Impatient(), Recording("other", seen)])
    callbacks.on_step(1, 0.5)
    assert (callbacks.interrupted, len(seen)) == (True, 1)
    with pytest.raises(KeyboardInterrupt):
        callbacks.on_step(2, 0.5)


def test_a_burst_comes_whole_and_then_step_by_step(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Noting(Callback):
        def on_step(self, step: int, loss: float) -> None:
            seen.append(("step", self.run.step))

    class Whole(Callback):
        def on_records(self, records: Sequence[StepRecord]) -> None:
            seen.append(("burst", len(records)))

    run = RunHandle(directory=tmp_path, task="t", steps=9, num_workers=1)
    CallbackList([Whole()], run).report([record(1, 0.5), record(2, 0.5)])
    assert (seen, run.step) == ([("burst", 2)], 2)
    noting = Noting()
    both = CallbackList([noting, Whole()], run)
    both.report([record(3, 0.5), record(4, 0.5)])
    assert seen[1:] == [("burst", 2), ("step", 3), ("step", 4)]
    noting.on_record = lambda record: seen.append(("record", record.step))  # type: ignore[method-assign]
    both.report([record(5, 0.5)])
    assert seen[4:] == [("burst", 1), ("record", 5), ("step", 5)]


def test_a_row_says_rate_seconds_and_ranks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.on_begin(0, 9)
    file.on_records([StepRecord(step=1, loss=0.5, lr=0.1, ranks=(0, 1, 2, 5))])
    file.on_records([StepRecord.of(2, {})])
    file.on_evaluate(2, {"accuracy": 0.9})
    file.on_end()
    with path.open() as rows:
        table = list(csv.DictReader(rows))
    assert [(row["step"], row["metric"], row["lr"], row["ranks"]) for row in table] == [
        ("1", "loss", "0.1", "0-2 5"),
        ("2", "loss", "nan", ""),
        ("2", "accuracy", "", ""),
    ]
    seconds = [float(row["seconds"]) for row in table]
    assert 0 <= seconds[0] <= seconds[1] <= seconds[2]
    assert evaluation_at(path, 2) == {"accuracy": 0.9}
    assert evaluation_at(path, 1) == evaluation_at(tmp_path / "missing", 1) == {}


def test_seconds_go_on_where_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,metric,value,lr,seconds,ranks\n1,loss,0.5,0.1,1000.000,0\n")
    file = MetricsFile(path)
    file.on_begin(1, 9)
    file.on_records([record(2, 0.4)])
    file.on_end()
    assert float(path.read_text().splitlines()[-1].split(",")[4]) >= 1000


def test_a_step_is_the_mean_over_the_ranks_that_reported_it() -> None:
    both = StepRecord.of(1, {1: RankStep(0.2, None), 0: RankStep(0.4, 0.1)})
    assert (both.loss, both.lr, both.ranks) == ((0.4 + 0.2) / 2, 0.1, (0, 1))
    one = StepRecord.of(1, {1: RankStep(0.2, 0.1)})
    assert (one.loss, one.ranks) == (0.2, (1,))
    assert math.isnan(StepRecord.of(1, {}).loss)


def test_a_terminal_shows_what_begins_and_then_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    output = io.StringIO()
    screen = Console(file=output, width=120, force_terminal=True, force_interactive=True)
    history = History(Path("run"), Path("run/metrics.csv"))
    recorder, display = Recorder(history), ProgressDisplay(screen, history)
    display.on_phase("starting Ray and 2 shards")
    display.on_begin(0, 2)
    display.on_phase("starting 2 workers")
    phases = Phases(0.002, 0.0, 0.001, 0.0005, 0.0005)
    first = StepRecord(step=1, loss=0.75, lr=0.1, ranks=(0, 1), phases=phases, samples=64)
    history.step_seconds = 0.1
    recorder.on_records([first])
    display.on_records([first])
    display.on_status(STATUS, {0: "10.0.0.1 (ab12)"})
    display.on_recovery(1, "worker 1", "it died")
    display.on_save(1, "step_00000001")
    display.on_message("it is [saved]")
    display.on_end()
    shown = output.getvalue()
    assert "starting Ray and 2 shards" in shown
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.rpartition("it is [saved]")[2])
    for word in (
        *("1/2", "0 s left", "0.7500", "10.0 steps/s", "640 samples/s", "4.00 ms", "wait 1.00"),
        *("0 10.0.0.1 (ab12)", "1 recovered", "worker 1, step 1", "step 1, 0 s ago"),
    ):
        assert word in last, word


def test_a_line_for_each_evaluation_is_all_that_a_brief_log_has(tmp_path: Path) -> None:
    output = io.StringIO()
    history = History(Path("run"), Path("run/metrics.csv"))
    display = ProgressDisplay(Console(file=output, width=120), history, is_brief=True)
    display.on_begin(0, 9)
    for step in range(1, 10):
        display.on_records([record(step, 0.5)])
    display.on_evaluate(9, {"accuracy": 0.9})
    display.on_end()
    assert output.getvalue() == "step 9/9  loss 0.5000  accuracy 0.9000  0.0 steps/s\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.0000"),
        (1e-7, "1.000e-07"),
        (0.0012345, "0.001234"),
        (-0.5, "-0.5000"),
        (31.25, "31.2500"),
        (math.nan, "nan"),
        (2e7, "2.000e+07"),
    ],
)
def test_a_small_loss_has_digits(value: float, shown: str) -> None:
    assert figure(value) == shown


@pytest.mark.parametrize("verbose", [3, -1, "loud", None])
def test_a_verbosity_that_there_is_not_is_refused(verbose: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='verbose must be 0, 1, 2 or "auto"'):
        fit(Digits(), steps=1, verbose=verbose, checkpoint_dir=tmp_path / "run", backend="local")
    assert not (tmp_path / "run").exists()


def test_a_trend_is_a_few_bars_however_long_the_run() -> None:
    trend = Trend(1.0 / step for step in range(1, 100_001))
    bars = trend.sparkline()
    assert 2 <= len(bars) <= 64
    assert (bars[0], bars[-1]) == ("█", "▁")
    assert list(bars) == sorted(bars, reverse=True)
    assert Trend([1.0, 1.0]).sparkline() == "▁▁"
    assert Trend([math.nan, 1.0]).sparkline() == ""


def test_a_log_says_what_begins() -> None:
    output = io.StringIO()
    history = History(Path("run"), Path("run/metrics.csv"))
    ProgressDisplay(Console(file=output, width=120), history).on_phase("starting 2 workers")
    assert output.getvalue() == "starting 2 workers\n"


def test_a_printed_history_is_one_line() -> None:
    history = History(Path("run"), Path("run/metrics.csv"))
    assert "no steps" in repr(history)
    recorder = Recorder(history)
    for step in range(1, 1001):
        recorder.on_records([record(step, 0.5)])
    recorder.on_evaluate(1000, {"accuracy": 0.9})
    text = str(history)
    assert len(text) < 200
    assert "\n" not in text
    for word in ("steps 1 to 1000", "loss 0.5", "accuracy 0.9"):
        assert word in text


@pytest.mark.parametrize("error", [RayLost, Rewound, ShardLost, Unrecoverable])
def test_a_death_that_a_callback_met_is_recovered_from(error: type[Exception]) -> None:
    class Asking(Callback):
        def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
            raise error("it died")

    callbacks = CallbackList([Asking()])
    for _ in range(2):
        with pytest.raises(error):
            callbacks.on_evaluate(1, {})
    assert callbacks.failure is None
