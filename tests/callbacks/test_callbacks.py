"""Callbacks with Keras's names: what they see, and that they stop, save and set rates."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.callbacks import (
    CSVLogger,
    EarlyStopping,
    EpochCallback,
    LambdaCallback,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    TerminateOnNaN,
    WandbMetricsLogger,
)
from distnadam.errors import ConfigError, TrainingError
from distnadam.schedules import Constant
from distnadam.training.callbacks import CallbackList
from distnadam.training.run_handle import RunHandle
from distnadam.training.steps import StepRecord
from tests.training.test_fit import Quadratic, train, weights


class Scripted(Quadratic):
    """Its evaluations give these values of `loss` and their negatives as `accuracy`."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = list(values)

    def evaluate(self, params: Any) -> dict[str, float]:
        value = self.values.pop(0)
        return {"loss": value, "accuracy": -value}


class Seen(EpochCallback):
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.events.append(("train_begin",))

    def on_train_end(self, logs: Any = None) -> None:
        self.events.append(("train_end", sorted(logs)))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.events.append(("epoch_begin", epoch))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.events.append(("epoch_end", epoch, logs))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.events.append(("batch_end", batch, logs["loss"]))


def run(path: Path, values: list[float], *callbacks: Any, **how: Any) -> Any:
    """Train with one evaluation for each value, every two steps."""
    return train(
        path,
        2 * len(values),
        Scripted(values),
        evaluate_every=2,
        callbacks=callbacks,
        **how,
    )


def test_an_epoch_lies_between_two_evaluations_and_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    seen = Seen()
    history = run(tmp_path, [3.0, 2.0], seen)
    names = [event[:2] if event[0] != "train_end" else event for event in seen.events]
    logged = ["learning_rate", "loss", "val_accuracy", "val_loss"]
    assert names == [
        ("train_begin",),
        ("epoch_begin", 0),
        ("batch_end", 0),
        ("batch_end", 1),
        ("epoch_end", 0),
        ("epoch_begin", 1),
        ("batch_end", 2),
        ("batch_end", 3),
        ("epoch_end", 1),
        ("train_end", logged),
    ]
    logs = seen.events[4][2]
    assert logs["loss"] == pytest.approx(np.mean(history.losses[:2]))
    assert (logs["val_loss"], logs["val_accuracy"]) == (3.0, -3.0)
    assert logs["learning_rate"] == 0.002
    resumed = Seen()
    train(tmp_path, 6, Scripted([1.0]), evaluate_every=2, callbacks=[resumed])
    assert [event[:2] for event in resumed.events][1:5] == [
        ("epoch_begin", 2),
        ("batch_end", 4),
        ("batch_end", 5),
        ("epoch_end", 2),
    ]


def test_callbacks_that_were_given_to_a_run_begin_anew_in_another(tmp_path: Path) -> None:
    rows = tmp_path / "epochs.csv"
    used = [Seen(), EarlyStopping(patience=3), CSVLogger(rows), ReduceLROnPlateau()]
    for name in ("first", "second"):
        used[0].events.clear()  # type: ignore[attr-defined]
        history = run(tmp_path / name, [1.0, 2.0, 2.0], *used)
        assert history.outcome == "finished"
        assert used[0].events[0] == ("train_begin",)  # type: ignore[attr-defined]
        assert (used[1].best_epoch, used[1].wait) == (0, 2)  # type: ignore[attr-defined]
        assert len(rows.read_text().splitlines()) == 4


def test_the_names_of_long_ago_are_called_too(tmp_path: Path) -> None:
    class Old(EpochCallback):
        seen: list[tuple[str, int]] = []  # noqa: RUF012

        def on_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.seen.append(("begin", batch))

        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            self.seen.append(("end", batch))

    train(tmp_path, 2, callbacks=[Old()])
    assert Old.seen == [("begin", 0), ("end", 0), ("begin", 1), ("end", 1)]


def test_early_stopping_restores_the_parameters_of_the_best_epoch(tmp_path: Path) -> None:
    kept: dict[int, Any] = {}
    keep = LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.update(
            {epoch: keep.run.optimizer.get_params()["w"].copy()}
        )
    )
    stop = EarlyStopping(patience=2, restore_best_weights=True)
    history = run(tmp_path, [3.0, 1.0, 2.0, 2.0, 0.0, 0.0], keep, stop)
    assert history.outcome == "stopped: EarlyStopping: val_loss has not improved for 2 epochs"
    assert (stop.best_epoch, stop.stopped_epoch) == (1, 3)
    assert history.steps[-1] == 8
    with DistNadam.restore(tmp_path, backend="local") as optimizer:
        assert optimizer.iterations == 8
        assert optimizer.get_params()["w"].tobytes() == kept[1].tobytes()


VALUES = [3.0, 2.0, 2.5, 2.4, 1.9, 2.6, 2.5, 2.4, 2.3, 2.2]


def deciding(root: Path, *more: Any) -> list[Any]:
    """Callbacks that decide by what they saw before."""
    return [
        EarlyStopping(patience=4, restore_best_weights=True),
        EarlyStopping("loss", patience=100),
        ReduceLROnPlateau(factor=0.5, patience=2),
        ModelCheckpoint(root / "best" / "{val_loss}", save_best_only=True),
        *more,
    ]


def decided(root: Path, *, losses: Any) -> list[Any]:
    with DistNadam.restore(root / "run", backend="local") as optimizer:
        params = optimizer.get_params()["w"].tolist()
        assert isinstance(optimizer.lr, float)
        return [
            params,
            optimizer.lr,
            optimizer.round,
            sorted(path.name for path in (root / "best").iterdir()),
            losses.best_epoch,
            losses._monitor.best,
        ]


class Cutter(EpochCallback):
    """Ends a run after so many steps; not a decision of the run that resumes, which has none."""

    def __init__(self, cut: int) -> None:
        self.cut = cut

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch + 1 >= self.cut:
            self.run.stop("cut")


@pytest.mark.parametrize("cut", range(1, 19))
def test_a_resumed_run_decides_as_one_that_was_not_interrupted(tmp_path: Path, cut: int) -> None:
    found, stops = [], "stopped: EarlyStopping: val_loss has not improved for 4 epochs"
    for parts in ([VALUES], [VALUES, VALUES]):
        root, consumed = tmp_path / str(len(parts)), 0
        for number, values in enumerate(parts):
            ends = number < len(parts) - 1
            callbacks = deciding(root, *([Cutter(cut)] if ends else []))
            history = train(
                root / "run",
                2 * len(values),
                Scripted(values[consumed:]),
                evaluate_every=2,
                save_every=1,
                callbacks=callbacks,
            )
            assert history.outcome == ("stopped: cut" if ends else stops)
            consumed += len(history.evaluations)
        found.append(decided(root, losses=callbacks[1]))
    assert found[0] == found[1]


def test_a_decision_to_stop_is_kept_as_long_as_its_callback_is_there(tmp_path: Path) -> None:
    def at_five() -> LambdaCallback:
        stop = LambdaCallback()
        stop.on_train_batch_end = (  # type: ignore[method-assign]
            lambda batch, logs: batch == 4 and stop.run.stop("enough")
        )
        return stop

    first = train(tmp_path, 10, save_every=5, callbacks=[at_five()])
    said = Seen()
    again = train(tmp_path, 10, save_every=5, callbacks=[said, at_five()])
    assert first.outcome == again.outcome == "stopped: enough"
    assert again.steps == []
    assert said.events == [("train_begin",), ("train_end", [])], "no epoch begins"
    without = train(tmp_path, 10, save_every=5)
    assert (without.outcome, without.steps[0]) == ("finished", first.steps[-1] + 1)


def test_a_run_that_was_stopped_goes_on_with_more_patience(tmp_path: Path) -> None:
    def resumed(patience: int, *values: float) -> Any:
        stop = EarlyStopping(patience=patience)
        return train(tmp_path, 20, Scripted(list(values)), evaluate_every=2, callbacks=[stop])

    assert resumed(2, 1.0, 2.0, 3.0).steps[-1] == 6
    assert resumed(2).steps == []
    assert resumed(4, 3.0, 4.0).steps == [7, 8, 9, 10], "two epochs more"


def test_a_decision_after_the_checkpoint_that_a_run_goes_back_to_is_made_again() -> None:
    handle = RunHandle(directory=Path(), task="t", steps=9, num_workers=1)
    stop = LambdaCallback(on_train_batch_end=lambda batch, logs: handle.stop("enough"))
    both = CallbackList([stop, EarlyStopping(patience=1)], handle)
    both.begin(None)
    both.on_record(StepRecord(1, 0.5, 0.1, (0,)))
    assert both.ends_run
    saved = both.data()
    both.begin(None)
    assert not both.ends_run
    both.begin(saved)
    assert handle.stopped == "enough"
    CallbackList([EarlyStopping()], handle).begin(saved)
    assert handle.stopped is None


def test_a_state_that_a_callback_does_not_take_is_refused_by_its_name(tmp_path: Path) -> None:
    class Keeps(LambdaCallback):
        def state(self) -> dict[str, Any]:
            return {"other": np.arange(3)}

    run(tmp_path, [3.0, 2.0], Keeps())

    class Other(LambdaCallback):
        def load_state(self, state: dict[str, Any]) -> None:
            super().load_state({"losses": state["mine"]})

    Other.__name__ = "Keeps"
    expected = r"callback Keeps\.load_state: it raised KeyError: 'mine'; the checkpoint has"
    with pytest.raises(TrainingError, match=expected):
        train(tmp_path, 6, Scripted([1.0]), evaluate_every=2, callbacks=[Other()])


@pytest.mark.parametrize(
    ("returned", "expected"),
    [(None, "expected a dict, got None"), (ValueError("odd"), "it raised ValueError: odd")],
)
def test_a_callback_that_does_not_return_its_state_is_named(
    tmp_path: Path, returned: object, expected: str
) -> None:
    class Odd(LambdaCallback):
        def state(self) -> Any:
            if isinstance(returned, Exception):
                raise returned
            return returned

    with pytest.raises(TrainingError, match=f"callback Odd.state: {expected}"):
        run(tmp_path, [3.0], Odd())


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, "expected a dict, got None"),
        ({"of": object()}, r"data\['of'\]"),
        (ValueError("odd"), "it raised ValueError: odd"),
    ],
)
def test_what_was_reached_is_saved_where_a_callback_does_not_return_its_state(
    tmp_path: Path, returned: object, expected: str
) -> None:
    class Odd(LambdaCallback):
        is_odd = False

        def state(self) -> Any:
            if not self.is_odd:
                return {}
            if isinstance(returned, Exception):
                raise returned
            return returned

        def on_step(self, step: int, loss: float) -> None:
            self.is_odd = self.is_odd or step == 4

    settings: dict[str, Any] = {"evaluate_every": 2, "save_every": 2}
    stop = EarlyStopping(patience=5)
    values = Scripted([3.0, 2.0, 1.0, 1.0, 1.0])
    with pytest.raises(TrainingError, match=f"callback Odd.state: {expected}") as failed:
        train(tmp_path / "run", 10, values, callbacks=[Odd(), stop], **settings)
    assert "has no state of it" in str(failed.value.__notes__)
    history = train(
        tmp_path / "run", 10, Scripted([1.0] * 4), callbacks=[EarlyStopping(patience=5)], **settings
    )
    assert history.steps[0] == 5, "the newest checkpoint is of the step where it raised"
    train(tmp_path / "whole", 10, Scripted([1.0] * 5), **settings)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_best_model_is_saved_in_a_directory_of_its_own(tmp_path: Path) -> None:
    best, each = tmp_path / "best", tmp_path / "each"
    history = run(
        tmp_path / "run",
        [3.0, 1.0, 2.0, 0.5, 0.6],
        ModelCheckpoint(best, save_best_only=True),
        ModelCheckpoint(each / "{epoch:02d}-{val_loss:.1f}"),
        save_every=1,
    )
    assert [path.name for path in best.iterdir()] == ["step_00000008"]
    assert sorted(path.name for path in each.iterdir()) == [
        "01-3.0",
        "02-1.0",
        "03-2.0",
        "04-0.5",
        "05-0.6",
    ]
    assert [Path(p).name for p in history.checkpoints] == [f"step_{n:08d}" for n in range(1, 11)]
    with DistNadam.restore(best, backend="local") as optimizer:
        assert optimizer.iterations == 8


def test_rates_are_set_between_epochs(tmp_path: Path) -> None:
    history = run(
        tmp_path / "scheduled",
        [1.0] * 3,
        LearningRateScheduler(lambda epoch, lr: 0.1 if epoch == 0 else lr / 2),
    )
    assert history.learning_rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    history = run(
        tmp_path / "plateau",
        [3.0, 3.0, 3.0, 2.0, 2.0],
        ReduceLROnPlateau(factor=0.5, patience=2, min_lr=0.0008),
    )
    assert history.learning_rates == [0.002] * 6 + [0.001] * 4
    with pytest.raises(TrainingError, match="lr is the schedule Constant"):
        run(
            tmp_path / "both",
            [1.0],
            LearningRateScheduler(lambda epoch: 0.1),
            optimizer=DistNadam(lr=Constant(0.1)),
        )


class Diverging(Quadratic):
    """Its loss is NaN from step 5 on; its gradients are finite."""

    def loss_and_gradients(self, params: Any, batch: Any) -> tuple[float, Any]:
        loss, gradients = super().loss_and_gradients(params, batch[1])
        return (math.nan if batch[0] >= 5 else loss), gradients

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        return step, super().batch(step, rank, world_size)


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path: Path) -> None:
    history = train(tmp_path, 10_000, Diverging(), callbacks=[TerminateOnNaN()])
    assert history.outcome == "stopped: TerminateOnNaN: the loss of step 6 is nan"
    assert history.steps[-1] < 10_000
    with pytest.raises(TrainingError, match="TerminateOnNaN: the loss of step 6 is nan"):
        train(tmp_path / "b", 10_000, Diverging(), callbacks=[TerminateOnNaN(raise_error=True)])


def test_rows_of_epochs_are_written_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    run(tmp_path / "a", [3.0, 2.0], CSVLogger(path))
    run(tmp_path / "b", [1.0], CSVLogger(path, append=True))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "learning_rate", "loss", "val_accuracy", "val_loss"]
    assert [(row["epoch"], row["val_loss"]) for row in rows] == [
        ("0", "3.0"),
        ("1", "2.0"),
        ("0", "1.0"),
    ]


class Raising(EpochCallback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            raise ZeroDivisionError("it is broken")


def test_a_callback_that_raises_ends_the_run_by_name_and_what_was_reached_is_saved(
    tmp_path: Path,
) -> None:
    said = r"callback Raising\.on_evaluate, step 4: it raised ZeroDivisionError: it is broken"
    with pytest.raises(TrainingError, match=said):
        run(tmp_path, [1.0] * 5, Raising())
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000004"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EarlyStopping(mode="best"), 'EarlyStopping: mode must be "auto", "min" or "max"'),
        (lambda: ReduceLROnPlateau(factor=1.0), r"factor must be in \(0, 1\), got 1.0"),
        (lambda: ModelCheckpoint("x", save_freq=5), r"give fit\(save_every=5\)"),
        (lambda: ModelCheckpoint("x", save_weights_only=True), "distnadam export"),
        (lambda: LambdaCallback(on_batch=print), "there is no event on_batch; there are on_epoch"),
        (lambda: TensorBoard(histogram_freq=1), "histogram_freq=1 is not supported"),
        (lambda: TensorBoard(update_freq=0), "a number of steps above 0, got 0"),
        (lambda: WandbMetricsLogger("often"), "got 'often'"),
    ],
)
def test_what_they_cannot_do_is_refused_when_they_are_made(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_value_that_no_epoch_has_is_named_with_those_it_has(tmp_path: Path) -> None:
    said = "monitor='f1': an epoch has learning_rate, loss, val_accuracy, val_loss"
    with pytest.raises(TrainingError, match=said):
        run(tmp_path / "a", [1.0], EarlyStopping(monitor="f1"))
    with pytest.raises(TrainingError, match=r"filepath='\{val_f1\}' names 'val_f1'; an epoch has"):
        run(tmp_path / "b", [1.0], ModelCheckpoint("{val_f1}"))
    assert run(tmp_path / "c", [1.0], EarlyStopping(monitor="accuracy")).outcome == "finished"
