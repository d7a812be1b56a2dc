"""TensorBoard, MLflow and Weights & Biases: what was logged, read back by their own readers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from distnadam.callbacks import MlflowCallback, TensorBoard, WandbMetricsLogger
from tests.callbacks.test_callbacks import run

pytestmark = pytest.mark.slow
VALUES = [3.0, 2.0, 1.0]


def test_tensorboards_own_reader_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = tmp_path / "logs"
    board = TensorBoard(logs, update_freq=3, write_steps_per_second=True)
    history = run(tmp_path / "run", VALUES, board)

    def scalars(where: str) -> dict[str, list[tuple[int, float]]]:
        found = reader.EventAccumulator(str(logs / where)).Reload()
        return {
            tag: [(event.step, event.value) for event in found.Scalars(tag)]
            for tag in found.Tags()["scalars"]
        }

    train, validation = scalars("train"), scalars("validation")
    assert validation == {
        "epoch_loss": [(0, 3.0), (1, 2.0), (2, 1.0)],
        "epoch_accuracy": [(0, -3.0), (1, -2.0), (2, -1.0)],
    }
    assert [step for step, _ in train["epoch_loss"]] == [0, 1, 2]
    assert train["batch_loss"] == [
        (3, pytest.approx(history.losses[2])),
        (6, pytest.approx(history.losses[5])),
    ]
    assert all(value > 0 for _, value in train["epoch_steps_per_second"])
    assert {f"phase_ms/{name}" for name in ("compute", "push", "wait", "apply", "pull")} < set(
        train
    )


def test_mlflow_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    run(tmp_path / "mine", VALUES, MlflowCallback())
    assert mlflow.active_run() is None
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert found.info.run_name == "mine"
    assert found.info.status == "FINISHED"
    assert found.data.params["task"] == "quadratic"
    assert found.data.params["beta_1"] == "0.9"
    logged = mlflow.MlflowClient().get_metric_history(found.info.run_id, "val_loss")
    assert [(metric.step, metric.value) for metric in logged] == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_wandb_has_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = tmp_path / "mine"
    run(directory, VALUES, WandbMetricsLogger(log_freq=2))
    assert wandb.run is None
    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    raw = file.read_bytes()
    for text in (b"epoch/val_loss", b"batch/batch_step", b"quadratic", b"epoch/learning_rate"):
        assert text in raw
    assert json.dumps(os.listdir(directory / "wandb"))
