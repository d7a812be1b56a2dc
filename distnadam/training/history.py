"""The record of a run, as data, and the callback that fills it in."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

from typing_extensions import override

from distnadam.training.callbacks import Callback
from distnadam.training.steps import Phases, StepRecord


@dataclass(repr=False)
class History:
    """The record of one call of `fit`.

    Args:
        checkpoint_dir: the local directory of the run.
        metrics_path: the CSV file of losses and metrics.
        plot_path: the picture of the loss; None if matplotlib is missing or the run did not end.
        steps: the steps done by this call, from 1; those of a resumed run begin later.
        losses: the mean loss of each of these steps over its `ranks`; NaN if there are none.
        learning_rates: the learning rate of each of these steps.
        gradient_norms: the norm of the mean gradient of each of these steps before it was clipped;
            NaN where clipping did not need it.
        ranks: whose losses each mean is of: all ranks, unless the process of one died before it
            could report, or the run went on without one.
        evaluations: (step, metrics) of each evaluation.
        checkpoints: the checkpoints written by this call, oldest first; URLs are strings.
        resumed_from: the checkpoint that this call continued from, if any.
        seconds: the duration of the call, from its start to its end.
        step_seconds: those in which steps ran: without the start, evaluation and saving.
        recoveries: how often a rank, or the whole run, had to be started again, a standby took over
            or all shards went back.
        phase_seconds: the seconds of the `Phases` of each of these steps, one after the other.
        outcome: how the call ended: "finished", "stopped: ..." by a callback, "interrupted",
            "terminated", or "failed: ..."; "running" before.

    >>> from distnadam.training.tasks import built_in
    >>> history = fit(built_in("digits"), steps=3, backend="local", checkpoint_dir="run", verbose=0)
    >>> history.steps, history.outcome, list(history.metrics)
    ([1, 2, 3], 'finished', ['accuracy'])
    """

    checkpoint_dir: Path
    metrics_path: Path
    plot_path: Path | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    ranks: list[tuple[int, ...]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    checkpoints: list[Path | str] = field(default_factory=list)
    resumed_from: Path | str | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0
    recoveries: int = 0
    # numbers alone: an object for each step of a long run is one more for the garbage collector
    phase_seconds: "array[float]" = field(default_factory=lambda: array("d"))
    outcome: str = "running"

    @property
    def phases(self) -> list[Phases]:
        """Where the time of each of these steps went."""
        seconds = iter(self.phase_seconds)
        return [Phases(*of_step) for of_step in zip(*[seconds] * len(Phases._fields), strict=True)]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty before the first."""
        return self.evaluations[-1][1] if self.evaluations else {}

    @property
    def steps_per_s(self) -> float:
        """Steps of this call per second of `step_seconds`."""
        return len(self.steps) / self.step_seconds if self.step_seconds > 0 else 0.0

    @override
    def __repr__(self) -> str:
        steps = f"steps {self.steps[0]} to {self.steps[-1]}" if self.steps else "no steps"
        words = [
            steps,
            *([f"loss {self.losses[-1]:.4g}"] if self.losses else []),
            *(f"{name} {value:.4g}" for name, value in self.metrics.items()),
            f"{len(self.evaluations)} evaluations",
            f"{len(self.checkpoints)} checkpoints",
            f"{self.recoveries} recoveries",
            f"{self.seconds:.1f} s",
            str(self.checkpoint_dir),
        ]
        return f"<History: {', '.join(words)}>"


class Recorder(Callback):
    """Fills in a history."""

    def __init__(self, history: History) -> None:
        self._history = history

    @override
    def on_begin(self, step: int, steps: int) -> None:
        # steps after the one at which a run begins again are trained again
        kept = sum(done <= step for done in self._history.steps)
        history = self._history
        for column in (
            history.steps,
            history.losses,
            history.learning_rates,
            history.gradient_norms,
            history.ranks,
        ):
            del column[kept:]
        del history.phase_seconds[kept * len(Phases._fields) :]
        self._history.evaluations[:] = [
            entry for entry in self._history.evaluations if entry[0] <= step
        ]

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        history = self._history
        steps, losses, rates, ranks, phases, _, norms = zip(*records, strict=True)
        history.steps += steps
        history.losses += losses
        history.learning_rates += rates
        history.gradient_norms += norms
        are_same = ranks.count(ranks[0]) == len(ranks)
        history.ranks += repeat(ranks[0], len(ranks)) if are_same else ranks
        history.phase_seconds.extend(chain.from_iterable(phases))

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self._history.evaluations.append((step, dict(metrics)))

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        self._history.checkpoints.append(path)
