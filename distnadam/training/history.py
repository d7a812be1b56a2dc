"""The record of a run, as data, and the callback that fills it in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import override

from distnadam.training.callbacks import Callback


@dataclass
class History:
    """The record of one call of `fit`.

    Args:
        checkpoint_dir: the local directory of the run.
        metrics_path: the CSV file of losses and metrics.
        plot_path: the picture of the loss; None if matplotlib is missing or the run did not end.
        steps: the steps done by this call, from 1; those of a resumed run begin later.
        losses: the mean loss of each of these steps, over the ranks that reported theirs.
        evaluations: (step, metrics) of each evaluation.
        checkpoints: the checkpoints written by this call, oldest first; URLs are strings.
        resumed_from: the checkpoint that this call continued from, if any.
        seconds: the duration of training, evaluation and saving.
        recoveries: how often a rank, or the whole run, had to be started again.
    """

    checkpoint_dir: Path
    metrics_path: Path
    plot_path: Path | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    checkpoints: list[Path | str] = field(default_factory=list)
    resumed_from: Path | str | None = None
    seconds: float = 0.0
    recoveries: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation; empty before the first."""
        return self.evaluations[-1][1] if self.evaluations else {}

    @property
    def steps_per_s(self) -> float:
        """Steps of this call per second; evaluation and saving count."""
        return len(self.steps) / self.seconds if self.seconds > 0 else 0.0


class Recorder(Callback):
    """Fills in a history."""

    def __init__(self, history: History) -> None:
        self._history = history

    @override
    def on_begin(self, step: int, steps: int) -> None:
        # steps after the one at which a run begins again are trained again
        kept = sum(done <= step for done in self._history.steps)
        del self._history.steps[kept:], self._history.losses[kept:]
        self._history.evaluations[:] = [
            entry for entry in self._history.evaluations if entry[0] <= step
        ]

    @override
    def on_step(self, step: int, loss: float) -> None:
        self._history.steps.append(step)
        self._history.losses.append(loss)

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self._history.evaluations.append((step, dict(metrics)))

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        self._history.checkpoints.append(path)
