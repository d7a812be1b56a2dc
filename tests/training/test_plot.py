"""The picture of a run's metrics file, and what is no such file."""

from pathlib import Path

import pytest

from distnadam.errors import TrainingError
from distnadam.training.plot import plot_loss

PNG = b"\x89PNG"


@pytest.mark.parametrize("losses", [(1.0, 0.5), (0.0, -1.0)], ids=["logarithmic", "linear"])
def test_losses_and_metrics_are_drawn(losses: tuple[float, float], tmp_path: Path) -> None:
    rows = [f"{step},loss,{loss}" for step, loss in enumerate(losses, start=1)]
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("\n".join(["step,metric,value", *rows, "2,accuracy,0.5"]))
    picture = plot_loss(metrics, tmp_path / "loss.png")
    assert picture == tmp_path / "loss.png"
    assert picture.read_bytes().startswith(PNG)


def test_a_missing_file_and_one_without_losses_are_named(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    with pytest.raises(TrainingError, match=r"metrics\.csv: there is no such metrics file"):
        plot_loss(metrics, tmp_path / "loss.png")
    metrics.write_text("step,metric,value\n1,accuracy,0.5\n2,lo")
    with pytest.raises(TrainingError, match=r"metrics\.csv: holds no loss"):
        plot_loss(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
