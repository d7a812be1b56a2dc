"""The settings that a run goes on with: what is given takes effect or is refused, and what others
save of a run can be resumed.
"""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, Options, fit
from distnadam.checkpoint import store
from distnadam.errors import CheckpointError, ConfigError, LifecycleError, TrainingError
from distnadam.schedules import Exponential
from distnadam.training.callbacks import Callback
from tests.training.test_fit import Quadratic, train, weights


class Listener(Callback):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, text: str) -> None:
        self.messages.append(text)


class Locked(Quadratic):
    """Gets an attribute that cannot be copied."""

    def init(self, seed: int) -> Any:
        self.lock = threading.Lock()
        return super().init(seed)


class Setter(Callback):
    """Sets a rate at one event of one step, once."""

    def __init__(self, optimizer: DistNadam, event: str, at: int, rate: Any) -> None:
        self.optimizer = optimizer
        self.event = event
        self.at = at
        self.rate = rate

    def _set(self, event: str, step: int) -> None:
        if (event, step) == (self.event, self.at):
            self.optimizer.lr = self.rate

    def on_begin(self, step: int, steps: int) -> None:
        self._set("on_begin", step)

    def on_step(self, step: int, loss: float) -> None:
        self._set("on_step", step)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self._set("on_evaluate", step)

    def on_save(self, step: int, path: Any) -> None:
        self._set("on_save", step)


def rate_of(directory: Path) -> Any:
    return store.find(directory)[1].config["lr"]


@pytest.mark.parametrize(
    "rate", [0.1, Exponential(0.1, decay_steps=5, decay_rate=0.5)], ids=["float", "schedule"]
)
def test_a_rate_that_a_resumed_run_is_given_holds_from_there_on(tmp_path: Path, rate: Any) -> None:
    train(tmp_path, steps=5, optimizer=DistNadam(lr=0.5))
    listener = Listener()
    history = train(tmp_path, steps=8, optimizer=DistNadam(lr=rate), callbacks=[listener])
    by_step = [rate if isinstance(rate, float) else rate(step) for step in (5, 6, 7)]
    assert history.learning_rates == pytest.approx(by_step)
    assert any("the learning rate is" in text for text in listener.messages)
    again = train(tmp_path, steps=9, optimizer=DistNadam(lr=rate))
    assert again.learning_rates == [rate if isinstance(rate, float) else rate(8)]


def test_a_run_that_is_given_no_optimizer_keeps_what_it_had(tmp_path: Path) -> None:
    asked = DistNadam(lr=0.5, clipvalue=0.1, options=Options(on_nonfinite="skip"))
    train(tmp_path, steps=5, optimizer=asked)
    train(tmp_path, steps=6)
    manifest = store.load(tmp_path / "step_00000006")
    assert (manifest.config["lr"], manifest.config["clipvalue"]) == (0.5, 0.1)
    assert manifest.saved_options.on_nonfinite == "skip"


@pytest.mark.parametrize(
    "setting",
    [
        {"clipnorm": 1.0},
        {"beta_1": 0.8},
        {"beta_2": 0.9},
        {"epsilon": 1e-3},
        {"clipvalue": 1.0},
        {"sum_group": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_a_run_cannot_change_is_refused_by_name(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    train(tmp_path, steps=2)
    (name,) = setting
    with pytest.raises(ConfigError, match=f"optimizer: {name}=.*the run of .* cannot change this"):
        train(tmp_path, steps=3, optimizer=DistNadam(**setting))
    assert train(tmp_path, steps=3).steps == [3]


def test_options_that_a_resumed_run_is_given_take_effect(tmp_path: Path) -> None:
    train(tmp_path, steps=2)
    train(tmp_path, steps=3, optimizer=DistNadam(options=Options(on_nonfinite="skip")))
    assert store.load(tmp_path / "step_00000003").saved_options.on_nonfinite == "skip"


@pytest.mark.parametrize("given", [{}, {"backend": "auto"}, {"backend": "local"}], ids=repr)
def test_the_backend_is_the_optimizers_unless_fit_is_given_one(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    started: list[str] = []

    class Starts(Callback):
        def on_phase(self, text: str) -> None:
            started.append(text)

    how = {"checkpoint_dir": tmp_path, "verbose": False, "callbacks": [Starts()]} | given
    assert fit(Quadratic(), steps=2, optimizer=DistNadam(backend="local"), **how).steps == [1, 2]
    assert started == [], "nothing is started in this process"


@pytest.mark.parametrize(("made_with", "given"), [("local", "ray"), ("ray", "local")])
def test_two_backends_that_contradict_each_other_are_refused_with_both(
    tmp_path: Path, made_with: Any, given: Any
) -> None:
    message = f"backend: the optimizer was made with '{made_with}' and fit is called with '{given}'"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, steps=2, optimizer=DistNadam(backend=made_with), backend=given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("event", ["on_begin", "on_evaluate"])
def test_a_rate_set_in_a_callback_at_a_certain_step_holds_from_there(
    tmp_path: Path, event: str
) -> None:
    at = 0 if event == "on_begin" else 4
    seen = []
    for name in ("once", "twice"):
        optimizer = DistNadam(lr=0.5)
        setter = Setter(optimizer, event, at, 0.1)
        history = train(
            tmp_path / name, 8, evaluate_every=2, optimizer=optimizer, callbacks=[setter]
        )
        assert history.learning_rates == [0.5] * at + [0.1] * (8 - at)
        assert optimizer.lr == 0.1
        seen.append(weights(tmp_path / name))
    assert seen[0] == seen[1]


def test_a_rate_that_a_callback_changed_stays_when_the_same_script_resumes(tmp_path: Path) -> None:
    def script(steps: int, directory: Path) -> Any:
        optimizer = DistNadam(lr=0.5)
        setter = Setter(optimizer, "on_evaluate", 4, 0.1)
        return train(directory, steps, evaluate_every=2, optimizer=optimizer, callbacks=[setter])

    script(10, tmp_path / "whole")
    script(6, tmp_path / "parts")
    assert script(10, tmp_path / "parts").learning_rates == [0.1] * 4
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_what_a_callback_changed_stays_when_the_same_script_resumes(tmp_path: Path) -> None:
    class Changes(Callback):
        def __init__(self, optimizer: DistNadam) -> None:
            self.optimizer = optimizer

        def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 4:
                self.optimizer.set_config(beta_1=0.5, clipnorm=0.1)
                assert self.optimizer.get_config()["beta_1"] == 0.5

    def script(steps: int, directory: Path, **given: Any) -> list[str]:
        optimizer = DistNadam(**given)
        listener = Listener()
        callbacks = [Changes(optimizer), listener]
        train(directory, steps, evaluate_every=2, optimizer=optimizer, callbacks=callbacks)
        return listener.messages

    script(10, tmp_path / "whole")
    script(6, tmp_path / "parts")
    said = script(10, tmp_path / "parts")
    assert (
        "beta_1 stays 0.5, which it was changed to in the run; it began with 0.9" in said
        and "clipnorm stays 0.1, which it was changed to in the run; it began with None" in said
    )
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    with pytest.raises(ConfigError, match=r"beta_1=0\.3 \(the run has 0\.9\): the run of"):
        script(12, tmp_path / "parts", beta_1=0.3)
    script(12, tmp_path / "parts", beta_1=0.5)  # as the optimizer says that callbacks had changed


@pytest.mark.parametrize("event", ["on_step", "on_save"])
def test_a_rate_set_where_the_step_depends_on_the_time_is_refused(
    tmp_path: Path, event: str
) -> None:
    optimizer = DistNadam(lr=0.5)
    setter = Setter(optimizer, event, 4, 0.1)
    with pytest.raises(
        TrainingError,
        match=rf"callback Setter\.{event}, step 4: .*optimizer\.lr cannot be set here",
    ) as raised:
        train(tmp_path, 40, save_every=2, optimizer=optimizer, callbacks=[setter])
    assert isinstance(raised.value.__cause__, LifecycleError)
    assert rate_of(tmp_path) == 0.5
    optimizer.lr = 0.25  # the run is over
    train(tmp_path, 60, optimizer=optimizer)
    assert rate_of(tmp_path) == 0.25


def test_a_rate_set_before_holds_from_the_first_step(tmp_path: Path) -> None:
    optimizer = DistNadam(lr=0.5)
    optimizer.lr = 0.1
    assert train(tmp_path, 2, optimizer=optimizer).learning_rates == [0.1, 0.1]


def test_an_optimizer_that_says_otherwise_than_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_workers: the optimizer was made with 4 and fit"):
        train(tmp_path / "a", optimizer=DistNadam(num_workers=4))
    with pytest.raises(ConfigError, match="backend: the optimizer was made with 'ray' and fit"):
        train(tmp_path / "a", optimizer=DistNadam(backend="ray"))
    with (
        DistNadam(backend="local").build({"w": np.ones(2, np.float32)}) as built,
        pytest.raises(ConfigError, match="optimizer: is built already"),
    ):
        train(tmp_path / "a", optimizer=built)
    assert not (tmp_path / "a").exists()


def test_what_is_restored_set_and_saved_by_hand_is_resumed(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    train(run, steps=5)
    with DistNadam.restore(run, backend="local") as optimizer:
        optimizer.lr = 0.25
        optimizer.save(other)
        optimizer.save(run)  # in place of the checkpoint of that step
    for place in (run, other):
        history = train(place, steps=7)
        assert (history.steps, history.learning_rates) == ([6, 7], [0.25, 0.25])


def test_what_is_not_of_the_run_is_passed_over_in_its_directory(tmp_path: Path) -> None:
    train(tmp_path, steps=5)
    with DistNadam(backend="local").build({"w": np.ones(3000, np.float32)}) as optimizer:
        for _ in range(9):
            optimizer.apply_gradients({"w": np.ones(3000, np.float32)})
        optimizer.save(tmp_path)
    listener = Listener()
    history = train(tmp_path, steps=7, callbacks=[listener])
    assert history.resumed_from == tmp_path / "step_00000005"
    assert "step_00000009: its checkpoint is of no run of fit" in listener.messages[0]
    assert train(tmp_path, steps=12).resumed_from == tmp_path / "step_00000007"


def test_a_checkpoint_of_a_run_is_not_replaced_by_one_of_something_else(tmp_path: Path) -> None:
    train(tmp_path, steps=1)
    ones = {"w": np.ones(3000, np.float32)}
    with DistNadam(backend="local").build(ones) as optimizer:
        optimizer.apply_gradients(ones)
        with pytest.raises(CheckpointError, match=r"is a checkpoint of a run of fit .*'quadratic'"):
            optimizer.save(tmp_path)
        saving = tmp_path / "elsewhere"
        shutil.copytree(tmp_path / "step_00000001", saving / "step_00000001")
        with pytest.raises(CheckpointError, match="save to another place"):
            optimizer.save(saving, wait=False)
    assert train(tmp_path, steps=2).resumed_from == tmp_path / "step_00000001"


def test_a_directory_without_any_checkpoint_of_the_run_is_refused(tmp_path: Path) -> None:
    with DistNadam(backend="local").build({"w": np.ones(3000, np.float32)}) as optimizer:
        optimizer.save(tmp_path)
    with pytest.raises(CheckpointError, match="is of no run of fit: it was saved by hand; choose"):
        train(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": DistNadam(lr=lambda step: 0.1)},
        {"optimizer": DistNadam(name="local-has-none")},
        {"optimizer": "nadam"},
        {"replicas": 2},
        {"num_workers": 0},
        {"num_shards": 0},
        {"backend": "cloud"},
        {"keep": 0},
        {"keep_every": 0},
        {"keep_every_s": -1.0},
        {"save_every": 0},
        {"evaluate_every": 1.5},
        {"stop_grace_s": 0},
        {"resume": "maybe"},
        {"seed": -1},
        {"steps": 0},
        {"callbacks": [lambda step: None]},
        {"callbacks": [Callback]},
        {"task": Quadratic},
        {"task": Locked()},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_no_directory_is_claimed_for_arguments_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    how = {"task": Quadratic(), "steps": 2, "backend": "local", "verbose": False} | wrong
    with pytest.raises(ConfigError):
        fit(**how)
    assert list(tmp_path.iterdir()) == []
