"""The panel that shows a run on a terminal: what is known of it, and how that is drawn."""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.style import Style
from rich.text import Text

from distnadam.client.status import Status
from distnadam.training.steps import Phases, StepRecord

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BUCKETS = 32
_COLOURS = {
    "compute": "blue",
    "push": "yellow",
    "wait": "bright_black",
    "apply": "green",
    "pull": "magenta",
}
_BAR_WIDTH = 16
_LABEL_WIDTH = len("waits for")
_LABEL_STYLE = Style.parse("bright_black")
_GAP = 2
"""Cells between two columns."""
_ITEM = re.compile("[^ ](?:[^ ]| (?! ))*")
"""Of a row, such as a worker with its host: two spaces or more are between two."""
_HERE = "this process"
_KEEP = 0.8
"""Of the mean of phases, at each step that is looked at."""
_LATE_STEPS = 16
"""At most, of a burst: those whose phases are looked at; the others weigh next to nothing."""
_MOST_SHARDS = 8
_MOST_WORKERS = 16


class Trend:
    """The course of a value in at most `_MOST_BUCKETS` means, however many values there are."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._means: list[float] = []
        self._width = 1
        self._sum, self._count = 0.0, 0
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        """Add the value of one more step, which is left out unless it is finite."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count < self._width:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == _MOST_BUCKETS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._width *= 2

    def sparkline(self) -> str:
        """Return it as a row of bars, of its logarithm if all of it is positive."""
        values = self._means
        if len(values) < 2:
            return ""
        if min(values) > 0:
            values = [math.log(value) for value in values]
        low, high = min(values), max(values)
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BARS[round((value - low) * scale)] for value in values)


@dataclass
class RunView:
    """What is known of a run at one moment; what is not is None, empty or NaN.

    Attributes:
        name: the run's.
        phase: what is being waited for, before there are steps.
        since: when that began, by `time.monotonic`.
        step: steps done.
        steps: steps in all.
        loss: of the last step.
        trend: of the losses.
        metrics: of the last evaluation, after `evaluated` steps.
        steps_per_s: the speed of steps.
        samples: in a step, of all ranks.
        phases: where the time of late steps went.
        status: of the shards.
        workers: the host of each rank.
        recoveries: how many there were; `last_recovery` says who and when.
        saved: the last checkpoint, by its step, and when that was.
    """

    name: str
    phase: str | None = None
    since: float = 0.0
    step: int = 0
    steps: int | None = None
    loss: float = math.nan
    trend: Trend = field(default_factory=Trend)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated: int = 0
    steps_per_s: float = 0.0
    samples: int = 0
    phases: Phases | None = None
    status: Status | None = None
    workers: Mapping[int, str] = field(default_factory=dict)
    recoveries: int = 0
    last_recovery: str = ""
    saved: tuple[int, float] | None = None

    def take(self, records: Sequence[StepRecord]) -> None:
        """Take a burst of steps."""
        for record in records:
            self.trend.add(record.loss)
        for record in records[-_LATE_STEPS:]:
            self._take_phases(record.phases)
        if records:
            last = records[-1]
            self.step, self.loss = last.step, last.loss
            self.samples = last.samples or self.samples

    def _take_phases(self, now: Phases) -> None:
        if not math.isfinite(now.compute):
            return
        if self.phases is None:
            self.phases = now
        else:
            pairs = zip(self.phases, now, strict=True)
            self.phases = Phases(*[_KEEP * a + (1 - _KEEP) * b for a, b in pairs])


def render(view: RunView) -> RenderableType:
    """Return the panel."""
    body: list[RenderableType] = []
    if view.phase is not None:
        waited = f"  {time.monotonic() - view.since:.0f} s"
        body.append(Spinner("dots", Text.assemble(view.phase, (waited, "bright_black"))))
    elif view.steps:
        body.append(_Progress(view))
    body.append(_Rows(view))
    return Panel(Group(*body), title=Text(view.name), title_align="left", border_style="blue")


class _Rows:
    """What is known, as a table of two columns: a rich one measures both, which costs a run more
    than all else that is drawn.
    """

    def __init__(self, view: RunView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - _LABEL_WIDTH - _GAP)
        for label, text in _rows(self._view):
            for line in text.split() if "\n" in text.plain else [text]:
                for part in _cut(line, width, console):
                    yield Segment(label.ljust(_LABEL_WIDTH + _GAP), _LABEL_STYLE)
                    yield from part.render(console)
                    yield Segment.line()
                    label = ""


def _cut(line: Text, width: int, console: Console) -> Iterable[Text]:
    """Yield a text in parts of a width, cut where two spaces are, and elsewhere only if it must."""
    if line.cell_len <= width:
        yield line
        return
    begin, cuts = 0, []
    for item in _ITEM.finditer(line.plain):
        if item.start() > begin and cell_len(line.plain[begin : item.end()]) > width:
            begin = item.start()
            cuts.append(begin)
    for part in line.divide(cuts):
        part.rstrip()
        yield from [part] if part.cell_len <= width else part.wrap(console, width)


class _Progress:
    """A bar that takes what the words behind it leave of the line."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        step, steps, speed = self._view.step, self._view.steps, self._view.steps_per_s
        assert steps is not None
        done = f"{'':{_GAP}}{step:,}/{steps:,}  {100 * min(step, steps) // steps}%"
        left = ""
        if speed > 0 and step < steps:
            left = f"{'':{_GAP}}{duration((steps - step) / speed)} left"
        if len(done) + len(left) > options.max_width:
            left = ""
        bar = ProgressBar(
            total=steps, completed=step, complete_style="blue", finished_style="green"
        )
        width = max(0, options.max_width - len(done) - len(left))
        drawn = list(console.render(bar, options.update_width(width)))
        yield from Segment.adjust_line_length(drawn, width)
        yield Segment(done)
        yield Segment(left, _LABEL_STYLE)
        yield Segment.line()


def above_a_free_line(panel: RenderableType) -> RenderableType:
    """Return the panel of a live display with an empty line below it, where the cursor stays: a
    terminal that writes ^C there does not shift the panel, which fills its lines.
    """
    return Group(panel, Text())


def _rows(view: RunView) -> Iterable[tuple[str, Text]]:
    """Yield what is known, by a word for what it is."""
    yield from _training_rows(view)
    if view.status is not None:
        yield from _cluster_rows(view, view.status)
    elif view.workers:
        yield "workers", _workers(view)
    if view.recoveries:
        found = (f"{view.recoveries} recovered", "yellow")
        yield "faults", Text.assemble(found, f", last: {view.last_recovery}")
    if view.saved is not None:
        step, when = view.saved
        yield "saved", Text(f"step {step}, {duration(time.monotonic() - when)} ago")


def _training_rows(view: RunView) -> Iterable[tuple[str, Text]]:
    if not view.steps and view.step:
        yield "step", Text(str(view.step))
    if math.isfinite(view.loss):
        loss = (figure(view.loss), "bold")
        yield "loss", Text.assemble(loss, "  ", (view.trend.sparkline(), "blue"))
    if view.metrics:
        words = "  ".join(f"{name} {figure(value)}" for name, value in view.metrics.items())
        yield "metrics", Text.assemble(words, (f"  step {view.evaluated}", "bright_black"))
    if view.steps_per_s > 0:
        samples = f"  {view.samples * view.steps_per_s:,.0f} samples/s" if view.samples else ""
        yield "speed", Text(f"{view.steps_per_s:.1f} steps/s{samples}")
    if view.phases is not None:
        yield "a step", phases_text(view.phases)


def _cluster_rows(view: RunView, status: Status) -> Iterable[tuple[str, Text]]:
    yield "shards", _shards(status)
    if status.replicas:
        there = [shard for shard in status.shards if shard.standby]
        lag = max((shard.lag or 0 for shard in there), default=0)
        behind = f", {lag} rounds behind" if lag else ""
        yield "standbys", Text(f"{len(there)} of {len(status.shards)}{behind}")
    yield "workers", _workers(view)
    if view.saved is None:  # of a run elsewhere
        if status.awaited and view.steps_per_s == 0:  # else it waits for no more than a moment
            yield "waits for", Text(status.awaited, "yellow")
        if status.checkpoint:
            yield "saved", Text(status.checkpoint)


def phases_text(phases: Phases) -> Text:
    """Return phases as a bar, and in milliseconds."""
    total = phases.total
    text = Text(f"{1e3 * total:.2f} ms  ", style="bold")
    ends, seconds = [0], 0.0
    for each in phases:
        seconds += each
        ends.append(round(_BAR_WIDTH * seconds / total) if total > 0 else 0)
    for name, begin, end in zip(Phases._fields, ends, ends[1:], strict=False):
        text.append("█" * (end - begin), style=_COLOURS[name])
    for name, each in phases._asdict().items():
        text.append("\n" if name == Phases._fields[0] else "  ")
        text.append(name, style=_COLOURS[name])
        text.append(f" {1e3 * each:.2f}", style="not bold")
    return text


def _shards(status: Status) -> Text:
    text = Text()
    if all(each.node == _HERE and each.round is not None for each in status.shards):
        return Text(f"{len(status.shards)} in {_HERE}")
    for shard in status.shards[:_MOST_SHARDS]:
        is_well = shard.round is not None
        load = f" {100 * shard.load:.0f}%" if shard.load is not None else ""
        where = f" {shard.node}" if shard.node != _HERE else ""
        text.append(f"{shard.index}{where}{load}", style="" if is_well else "red")
        text.append("" if is_well else f" {shard.state}", style="red")
        text.append("   ")
    return _with_rest(text, len(status.shards) - _MOST_SHARDS)


def _workers(view: RunView) -> Text:
    states: Mapping[int, str] = view.status.workers if view.status is not None else {}
    ranks = sorted({*view.workers, *states})
    text = Text()
    gone = {rank for rank in ranks if states.get(rank, "").startswith(("died", "gone"))}
    if set(view.workers.values()) == {_HERE} and not gone:
        return Text(f"{len(ranks)} in {_HERE}")
    for rank in ranks[:_MOST_WORKERS]:
        where, state, is_gone = view.workers.get(rank, ""), states.get(rank, ""), rank in gone
        words = [str(rank), *([where] if where not in ("", _HERE) else [])]
        text.append(" ".join(words + ([state] if is_gone or not view.workers else [])))
        text.stylize("red" if is_gone else "", len(text) - len(state) if is_gone else 0)
        text.append("   ")
    return _with_rest(text, len(ranks) - _MOST_WORKERS)


def _with_rest(text: Text, more: int) -> Text:
    if more > 0:
        text.append(f"and {more} more", style="bright_black")
    text.rstrip()
    return text


def figure(value: float) -> str:
    """Return a loss or a metric with four digits that count.

    >>> figure(12.5), figure(0.51), figure(0.00012345), figure(3e-7)
    ('12.5000', '0.5100', '0.0001234', '3.000e-07')
    """
    size = abs(value)
    if not math.isfinite(value) or value == 0 or 1 <= size < 1e6:
        return f"{value:.4f}"
    if not 1e-4 <= size < 1:
        return f"{value:.3e}"
    return f"{value:.{3 - math.floor(math.log10(size))}f}"


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def step_line(step: int, steps: int | None, words: Sequence[str]) -> str:
    """Return a line for a log."""
    return "  ".join([f"step {step}/{steps}" if steps else f"step {step}", *words])
