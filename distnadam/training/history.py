"""What a run leaves behind, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distnadam.training.callbacks import Callback


@dataclass
class History:
    """The record of one call of `fit`.

    `steps` are the steps done by this call (from 1, so a resumed run begins later), `losses` their
    mean losses over the ranks that lived to tell theirs, `recoveries` how often a rank or the whole
    run had to be started anew.
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
        """The last evaluation's metrics."""
        return self.evaluations[-1][1] if self.evaluations else {}

    @property
    def steps_per_s(self) -> float:
        """Steps of this call per second of training, evaluation and saving included."""
        return len(self.steps) / self.seconds if self.seconds > 0 else 0.0


class Recorder(Callback):
    """Fills a history in."""

    def __init__(self, history: History) -> None:
        self._history = history

    def on_begin(self, step: int, steps: int) -> None:
        """Forget what comes after the step at which the run begins, or begins anew."""
        kept = sum(done <= step for done in self._history.steps)
        del self._history.steps[kept:], self._history.losses[kept:]
        self._history.evaluations[:] = [
            entry for entry in self._history.evaluations if entry[0] <= step
        ]

    def on_step(self, step: int, loss: float) -> None:
        """Enter the loss."""
        self._history.steps.append(step)
        self._history.losses.append(loss)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Enter the metrics."""
        self._history.evaluations.append((step, dict(metrics)))

    def on_save(self, step: int, path: Path | str) -> None:
        """Enter the checkpoint."""
        self._history.checkpoints.append(path)
