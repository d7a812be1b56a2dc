"""Callbacks beside Keras's own: the same arguments, and the same decisions on the same values."""

import inspect
import random
from pathlib import Path
from typing import Any

import pytest

from distnadam import callbacks
from distnadam.callbacks import EarlyStopping, ReduceLROnPlateau
from tests.callbacks.test_callbacks import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras
]

NAMES = [
    *("CSVLogger", "EarlyStopping", "LambdaCallback", "LearningRateScheduler", "ModelCheckpoint"),
    *("ReduceLROnPlateau", "TensorBoard", "TerminateOnNaN"),
]


@pytest.fixture(scope="module")
def keras() -> Any:
    return pytest.importorskip("keras")


@pytest.mark.parametrize("name", NAMES)
def test_arguments_have_keras_names_order_and_defaults(name: str, keras: Any) -> None:
    def arguments(kind: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(kind).parameters.values()
        return [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert arguments(getattr(callbacks, name)) == arguments(getattr(keras.callbacks, name))


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
    theirs, model = keras.callbacks.EarlyStopping(**how), model_of(keras)
    theirs.set_model(model)
    theirs.on_train_begin()
    for epoch, value in enumerate(values):
        theirs.on_epoch_end(epoch, {"val_loss": value})
        if model.stop_training:
            break
    ours = EarlyStopping(**how)
    history = run(tmp_path, values, ours)
    assert len(history.evaluations) == epoch + 1
    assert (ours.stopped_epoch, ours.best_epoch) == (theirs.stopped_epoch, theirs.best_epoch)


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
    theirs, model = keras.callbacks.ReduceLROnPlateau(**how), model_of(keras)
    theirs.set_model(model)
    theirs.on_train_begin()
    rates = []
    for epoch, value in enumerate(values):
        rates.append(float(model.optimizer.learning_rate))
        theirs.on_epoch_end(epoch, {"val_loss": value})
    history = run(tmp_path, values, ReduceLROnPlateau(**how))
    assert history.learning_rates[::2] == pytest.approx(rates, rel=1e-6)
