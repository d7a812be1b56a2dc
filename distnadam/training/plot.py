"""Plots a run's metrics file. matplotlib is imported here alone, when a plot is drawn."""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distnadam.errors import TrainingError
from distnadam.extras import how_to_install
from distnadam.tensors.arrays import own_errors
from distnadam.training.metrics_file import read_metrics

_SMOOTHED_OVER = 0.02
"""The share of the steps over which the smoothed loss forgets."""
_MARGIN = 0.05
"""Of an axis, beyond what is drawn."""

Points = list[tuple[int, float]]


def plot_loss(metrics_path: Path, plot_path: Path) -> Path:
    """Draw the loss, raw and smoothed, and the metrics of evaluations.

    The loss's axis is logarithmic if all losses are positive. Metrics of several evaluations have
    an axis of their own; those of one are written above.

    Args:
        metrics_path: the CSV file that `MetricsFile` wrote.
        plot_path: the picture to write; its suffix chooses the format.

    Returns:
        `plot_path`.

    Raises:
        TrainingError: matplotlib is missing or refuses, or the file has no loss.
    """
    series = _series(metrics_path)
    try:
        with _own_conditions():
            from matplotlib.figure import Figure

            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw(figure, series)
            figure.savefig(plot_path, dpi=120)
    except ImportError as error:
        raise TrainingError(f"a plot needs matplotlib: {how_to_install('plot')}") from error
    except (ValueError, RuntimeError) as error:  # of MPLBACKEND, a matplotlibrc, the suffix
        raise TrainingError(f"{plot_path}: matplotlib cannot draw it: {error}") from error
    return plot_path


@contextlib.contextmanager
def _own_conditions() -> Iterator[None]:
    """Keep the caller's NumPy errors and warning filters from matplotlib, and its remarks (on its
    cache, on fonts) from the caller.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with own_errors(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def draw(figure: Any, series: dict[str, Points]) -> None:
    """Draw the series of a metrics file, "loss" among them, on an empty matplotlib figure."""
    losses = series["loss"]
    curves = {metric: points for metric, points in series.items() if metric != "loss"}
    single = {metric: points[0] for metric, points in curves.items() if len(points) == 1}
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, linewidth=0.6, color="C0", alpha=0.4, label="loss of each step")
    axes.plot(steps, smoothed(values), linewidth=1.6, color="C0", label="loss, smoothed")
    axes.set(xlabel="step", ylabel="loss")
    if min(value for value in values if math.isfinite(value)) > 0:
        axes.set_yscale("log")
    lines = axes.get_lines()
    if len(single) < len(curves):
        others = axes.twinx()
        for number, (metric, points) in enumerate(curves.items(), start=1):
            if metric not in single:
                others.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    color=f"C{number}",
                    label=_literal(metric),
                )
        low, high = bounds([value for m in curves if m not in single for _, value in curves[m]])
        others.set_ylim(low, high)
        lines = [*lines, *others.get_lines()]
    # beside the curves, never over them
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)))
    if single:
        words = [f"{_literal(metric)} {value:.4g}" for metric, (_, value) in single.items()]
        steps_of = sorted({step for step, _ in single.values()})
        axes.set_title(f"step {', '.join(map(str, steps_of))}: {', '.join(words)}", fontsize=10)


def _literal(name: str) -> str:
    """Return a name as matplotlib draws it letter by letter: $ begins no formula."""
    return name.replace("$", r"\$")


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average of values, unbiased at the beginning."""
    keep = 1 - 1 / max(1.0, _SMOOTHED_OVER * len(values))
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total = keep * total + value
            weight = keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return averages


def bounds(values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis for values, which go beyond 0 or 1 only if a value does."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = _MARGIN * ((high - low) or abs(high) or 1.0)
    below, above = low - margin, high + margin
    if low >= 0:
        below = max(0.0, below)
    if high <= 1 and above > 1:
        above = 1.0
    return below, above


def _series(path: Path) -> dict[str, Points]:
    if not os.path.isfile(path):
        raise TrainingError(f"{path}: there is no such metrics file")
    series: dict[str, Points] = {}
    for step, metric, value in read_metrics(path):
        series.setdefault(metric, []).append((step, value))
    if not any(math.isfinite(value) for _, value in series.get("loss", [])):
        raise TrainingError(f"{path}: holds no loss")
    return series
