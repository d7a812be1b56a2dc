"""The picture of a run's metrics file, and what is no such file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam.errors import TrainingError
from distnadam.training.plot import bounds, draw, plot_loss, smoothed

PNG = b"\x89PNG"
LOSSES = [(step, 2.0 / step) for step in range(1, 301)]


def drawn(series: dict[str, list[tuple[int, float]]]) -> Any:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure, series)
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("losses", [(1.0, 0.5), (0.0, -1.0)], ids=["logarithmic", "linear"])
def test_losses_and_metrics_are_drawn(losses: tuple[float, float], tmp_path: Path) -> None:
    rows = [f"{step},loss,{loss},0.002,0.1,0-1" for step, loss in enumerate(losses, start=1)]
    rows.append("3,loss,nan,nan,0.1,")
    metrics = tmp_path / "metrics.csv"
    header = "step,metric,value,lr,seconds,ranks"
    metrics.write_text("\n".join([header, *rows, "2,accuracy,0.5,,0.1,"]))
    picture = plot_loss(metrics, tmp_path / "loss.png")
    assert picture == tmp_path / "loss.png"
    assert picture.read_bytes().startswith(PNG)


def test_metrics_of_one_evaluation_are_written_above_and_have_no_axis() -> None:
    figure = drawn({"loss": LOSSES, "accuracy": [(300, 0.974)], "top5": [(300, 1.0)]})
    (axes,) = figure.axes
    assert axes.get_title() == "step 300: accuracy 0.974, top5 1"


def test_the_loss_is_raw_and_smoothed() -> None:
    noisy = [(step, 1.0 + 0.5 * (step % 2)) for step in range(1, 1001)]
    raw, smooth = drawn({"loss": noisy}).axes[0].get_lines()
    assert list(raw.get_ydata()) == [value for _, value in noisy]
    assert max(smooth.get_ydata()[500:]) - min(smooth.get_ydata()[500:]) < 0.1
    assert smooth.get_ydata()[-1] == pytest.approx(1.25, abs=0.05)


def test_smoothing_begins_at_the_first_value_and_passes_over_what_is_none() -> None:
    assert smoothed((4.0, 4.0, float("nan"), 4.0)) == pytest.approx([4.0] * 4)
    assert smoothed((1.0, 2.0)) == [1.0, 2.0], "a short run is as it is"


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.5, 0.97], 0.4, 1.0),
        ([0.9, 1.0], 0.8, 1.0),
        ([1.0], 0.5, 1.0),
        ([0.0, 3.0], 0.0, 3.5),
        ([-1.0, 0.0], -1.5, 0.5),
        ([float("nan"), 0.5], 0.0, 1.0),
        ([float("inf")], 0.0, 1.0),
    ],
)
def test_an_axis_fits_what_is_drawn(values: list[float], low: float, high: float) -> None:
    begin, end = bounds(values)
    assert low <= begin < end <= high
    finite = [value for value in values if abs(value) < 10]
    assert all(begin <= value <= end for value in finite)


def test_the_axis_of_a_share_ends_at_one() -> None:
    accuracy = [(100, 0.9), (200, 0.97), (300, 1.0)]
    _, others = drawn({"loss": LOSSES, "accuracy": accuracy}).axes
    low, high = others.get_ylim()
    assert (low < 0.9, high) == (True, 1.0)


def test_the_legend_covers_no_curve() -> None:
    figure = drawn({"loss": LOSSES, "accuracy": [(100, 0.9), (300, 0.97)]})
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["loss of each step", "loss, smoothed", "accuracy"]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_a_missing_file_and_one_without_losses_are_named(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    with pytest.raises(TrainingError, match=r"metrics\.csv: there is no such metrics file"):
        plot_loss(metrics, tmp_path / "loss.png")
    metrics.write_text("step,metric,value,lr,seconds,ranks\n1,accuracy,0.5,,,\n2,lo")
    with pytest.raises(TrainingError, match=r"metrics\.csv: holds no loss"):
        plot_loss(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["step,metric,value,lr,seconds,ranks", *rows]))
    return path


@pytest.mark.parametrize(
    "rows",
    [
        [f"{step},loss,{10.0 ** (-3 * step)},0.002,0.1,0" for step in range(1, 100)],
        ["1,loss,5e-324,0.002,0.1,0", "2,loss,1e-310,0.002,0.1,0"],
        ["1,loss,1,0.002,0.1,0", "1,精度,0.5,,,", "2,精度,0.6,,,"],
    ],
    ids=["tiny", "denormal", "no-glyph"],
)
@pytest.mark.filterwarnings("error")
def test_a_plot_is_drawn_whatever_the_caller_makes_of_warnings(
    rows: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    with np.errstate(all="raise"):
        picture = plot_loss(write(tmp_path / "metrics.csv", *rows), tmp_path / "loss.png")
    assert picture.read_bytes().startswith(PNG)
    assert caplog.records == []


def test_a_name_with_dollars_is_drawn_letter_by_letter() -> None:
    figure = drawn({"loss": LOSSES, "$a$": [(1, 0.5)], "b$c$": [(1, 0.5), (2, 0.6)]})
    (legend,) = figure.legends
    written = [figure.axes[0].get_title(), legend.get_texts()[-1].get_text()]
    assert written == [r"step 1: \$a\$ 0.5", r"b\$c\$"]


def test_what_matplotlib_refuses_is_a_plot_that_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics = write(tmp_path / "metrics.csv", "1,loss,0.5,0.002,0.1,0")
    with pytest.raises(TrainingError, match=r"loss\.nothing: matplotlib cannot draw it: .*nothing"):
        plot_loss(metrics, tmp_path / "loss.nothing")
