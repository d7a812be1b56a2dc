"""Callbacks beside Keras's own: the same arguments, and the same decisions on the same values."""

import inspect
import os
import random
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam, callbacks
from distnadam.callbacks import EarlyStopping, EpochCallback, ReduceLROnPlateau
from tests.callbacks.test_callbacks import run

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras
]

NAMES = [
    *("CSVLogger", "EarlyStopping", "LambdaCallback", "LearningRateScheduler", "ModelCheckpoint"),
    *("ReduceLROnPlateau", "TensorBoard", "TerminateOnNaN"),
]
OTHER_ARGUMENTS = {
    ("LambdaCallback", "kwargs"): "Keras takes any name, and calls it never: ours is refused",
    ("LambdaCallback", "others"): "takes them, to refuse them by name",
    ("ReduceLROnPlateau", "kwargs"): "only there to refuse `epsilon`, of long ago",
    ("MlflowCallback", "model_id"): "of a model that MLflow has logged; a checkpoint is none",
    ("MlflowCallback", "run"): "a run that is not the active one, by name only",
    ("WandbMetricsLogger", "args"): "handed on to Keras's Callback, which takes none",
    ("WandbMetricsLogger", "kwargs"): "handed on to Keras's Callback, which takes none",
}
"""Arguments that only one of the two has, with why."""
ONLY_THEIRS = {
    "set_model": "there is no model: `self.run` is there from the first event",
    "set_params": "`self.run` has the steps, and `evaluate_every` is an epoch's",
    **dict.fromkeys(
        ["on_test_begin", "on_test_end", "on_test_batch_begin", "on_test_batch_end"],
        "the task evaluates, as it likes; that it has, `on_epoch_end` says",
    ),
    **dict.fromkeys(
        ["on_predict_begin", "on_predict_end", "on_predict_batch_begin", "on_predict_batch_end"],
        "`fit` predicts nothing",
    ),
}
"""Methods of Keras's Callback that ours has not, with why."""


@pytest.fixture(scope="module")
def keras() -> Any:
    return pytest.importorskip("keras")


def theirs(name: str, keras: Any) -> Any:
    """The class of that name, of Keras, MLflow or Weights & Biases."""
    if name == "MlflowCallback":
        return pytest.importorskip("mlflow.keras").MlflowCallback
    if name == "WandbMetricsLogger":
        return pytest.importorskip("wandb.integration.keras").WandbMetricsLogger
    return getattr(keras.callbacks, name)


@pytest.mark.parametrize("name", [*NAMES, "MlflowCallback", "WandbMetricsLogger"])
def test_arguments_have_their_names_order_kinds_and_defaults(name: str, keras: Any) -> None:
    def arguments(kind: Any) -> list[tuple[Any, ...]]:
        found = inspect.signature(kind).parameters.values()
        return [(p.name, p.kind, p.default) for p in found if (name, p.name) not in OTHER_ARGUMENTS]

    assert arguments(getattr(callbacks, name)) == arguments(theirs(name, keras))


def test_events_have_keras_names_and_arguments(keras: Any) -> None:
    kind = keras.callbacks.Callback
    methods = [name for name in dir(kind) if name.startswith(("on_", "set_"))]
    assert {name for name in methods if not hasattr(EpochCallback, name)} == set(ONLY_THEIRS)
    for name in set(methods) - set(ONLY_THEIRS):
        ours = inspect.signature(getattr(EpochCallback, name)).parameters.values()
        keras_own = inspect.signature(getattr(kind, name)).parameters.values()
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in keras_own]
    with pytest.raises(AttributeError, match=r"there is no model: self.run.stop\(reason\)"):
        _ = EpochCallback().model
    assert EpochCallback.__doc__
    assert "self.run.stop" in EpochCallback.__doc__


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("EarlyStopping", ["best", "wait", "stopped_epoch", "best_epoch"]),
        ("ReduceLROnPlateau", ["best", "wait"]),
        ("ModelCheckpoint", ["best"]),
    ],
)
def test_what_is_read_of_them_afterwards_has_keras_names(
    name: str, attributes: list[str], tmp_path: Path, keras: Any
) -> None:
    how: dict[str, Any] = {"patience": 5}
    if name == "ModelCheckpoint":
        how = {"filepath": str(tmp_path / "best.keras"), "save_best_only": True}
    own, ours, values = theirs(name, keras)(**how), getattr(callbacks, name)(**how), [3.0, 1.0, 2.0]
    own.set_model(model_of(keras))
    own.on_train_begin()
    for epoch, value in enumerate(values):
        own.on_epoch_end(epoch, {"val_loss": value})
    if name == "ModelCheckpoint":
        (tmp_path / "best.keras").unlink()  # ours is a directory
    run(tmp_path / "run", values, ours)
    for each in attributes:
        assert getattr(ours, each) == getattr(own, each), each


def test_a_file_of_an_epoch_has_keras_number(tmp_path: Path, keras: Any) -> None:
    template = "{epoch:02d}-{val_loss:.1f}"
    own = keras.callbacks.ModelCheckpoint(f"{template}.keras")
    names = [own._get_file_path(i, None, {"val_loss": v}) for i, v in enumerate([3.0, 2.0])]
    run(tmp_path / "run", [3.0, 2.0], callbacks.ModelCheckpoint(tmp_path / "best" / template))
    saved = sorted(path.name for path in (tmp_path / "best").iterdir())
    assert [f"{name}.keras" for name in saved] == names == ["01-3.0.keras", "02-2.0.keras"]


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 2.5], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
def test_the_best_parameters_are_those_at_the_end_where_keras_has_them(
    values: list[float], tmp_path: Path, keras: Any
) -> None:
    own = keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)
    model = model_of(keras)
    own.set_model(model)
    own.on_train_begin()
    for epoch, value in enumerate(values):
        model.layers[0].bias.assign([float(epoch)])
        own.on_epoch_end(epoch, {"val_loss": value})
    own.on_train_end()
    best = int(model.layers[0].bias.numpy()[0])
    kept: list[bytes] = []

    class Keep(EpochCallback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            kept.append(self.run.optimizer.get_params()["w"].tobytes())

    run(tmp_path, values, Keep(), EarlyStopping(patience=9, restore_best_weights=True))
    with DistNadam.restore(tmp_path, backend="local") as optimizer:
        assert optimizer.get_params()["w"].tobytes() == kept[best]


def model_of(keras: Any) -> Any:
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.002), loss="mse")
    return model


@pytest.mark.parametrize("seed", range(6))
def test_early_stopping_stops_where_keras_does(seed: int, tmp_path: Path, keras: Any) -> None:
    draw = random.Random(seed)
    values = [round(draw.uniform(0, 1), 2) for _ in range(25)]
    how = {
        "patience": draw.randrange(6),
        "min_delta": draw.choice([0, 0.05]),
        "mode": draw.choice(["min", "max"]),
        "baseline": draw.choice([None, 0.5]),
        "start_from_epoch": draw.choice([0, 3]),
    }
    own, model = keras.callbacks.EarlyStopping(**how), model_of(keras)
    own.set_model(model)
    own.on_train_begin()
    for epoch, value in enumerate(values):
        own.on_epoch_end(epoch, {"val_loss": value})
        if model.stop_training:
            break
    ours = EarlyStopping(**how)
    history = run(tmp_path, values, ours)
    assert len(history.evaluations) == epoch + 1
    assert (ours.stopped_epoch, ours.best_epoch) == (own.stopped_epoch, own.best_epoch)


@pytest.mark.parametrize("seed", range(6))
def test_a_plateau_lowers_the_rate_where_keras_does(seed: int, tmp_path: Path, keras: Any) -> None:
    draw = random.Random(seed)
    values = [round(draw.uniform(0, 1), 2) for _ in range(25)]
    how = {
        "patience": draw.randrange(1, 5),
        "factor": 0.5,
        "mode": draw.choice(["min", "max"]),
        "cooldown": draw.choice([0, 2]),
        "min_lr": draw.choice([0.0, 0.0004]),
    }
    own, model = keras.callbacks.ReduceLROnPlateau(**how), model_of(keras)
    own.set_model(model)
    own.on_train_begin()
    rates = []
    for epoch, value in enumerate(values):
        rates.append(float(model.optimizer.learning_rate))
        own.on_epoch_end(epoch, {"val_loss": value})
    history = run(tmp_path, values, ReduceLROnPlateau(**how))
    assert history.learning_rates[::2] == pytest.approx(rates, rel=1e-6)
