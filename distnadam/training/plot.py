"""Plots a run's metrics file. matplotlib is imported here alone, when a plot is drawn."""

from pathlib import Path

from distnadam.errors import TrainingError
from distnadam.training.callbacks import read_metrics


def plot_loss(metrics_path: Path, plot_path: Path) -> Path:
    """Draw the loss, logarithmic if positive, and the other metrics on a second axis.

    Args:
        metrics_path: the CSV file that `MetricsFile` wrote.
        plot_path: the picture to write; its suffix chooses the format.

    Returns:
        `plot_path`.

    Raises:
        TrainingError: matplotlib is missing, or the file has no loss.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError("a plot needs matplotlib: pip install 'distnadam[plot]'") from error
    if not metrics_path.is_file():
        raise TrainingError(f"{metrics_path}: there is no such metrics file")
    series: dict[str, list[tuple[int, float]]] = {}
    for step, metric, value in read_metrics(metrics_path):
        series.setdefault(metric, []).append((step, value))
    if "loss" not in series:
        raise TrainingError(f"{metrics_path}: holds no loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    losses = series.pop("loss")
    axes.plot(*zip(*losses, strict=True), linewidth=0.8, label="loss")
    axes.set(xlabel="step", ylabel="loss")
    if min(value for _, value in losses) > 0:
        axes.set_yscale("log")
    if series:
        others = axes.twinx()
        for number, (metric, points) in enumerate(series.items(), start=1):
            others.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=metric)
        others.legend(loc="center right")
    figure.savefig(plot_path, dpi=120)
    return plot_path
