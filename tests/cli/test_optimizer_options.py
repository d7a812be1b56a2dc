"""The options of `train` for the optimizer: what a run is given, keeps, and cannot change."""

import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from distnadam import DistNadam, fit, schedules
from distnadam.checkpoint import store
from distnadam.cli import main
from distnadam.cli.optimizer_options import SCHEDULE_ROWS, schedule_of
from distnadam.cli.training import _SECTIONS
from distnadam.schedules import (
    Constant,
    CosineRestarts,
    Exponential,
    InverseSquareRoot,
    OneCycle,
    Piecewise,
    Polynomial,
    Schedule,
    Sequential,
    Warmup,
    WarmupCosine,
    rate_to_dict,
)
from distnadam.training.tasks.digits import Digits
from tests.cli.test_cli import TRAIN, call, interrupted_task


def config_of(directory: Path) -> dict[str, Any]:
    return store.find(directory)[1].config


def train(directory: Path, steps: int, *asked: Any) -> Any:
    return call(*TRAIN, "--checkpoint-dir", directory, "--steps", steps, *asked)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nadam", {"formula": "nadam", "weight_decay": 0.0, "lr": 0.002}),
        ("nadamw", {"formula": "nadam", "weight_decay": 0.01, "lr": 0.002}),
        ("adam", {"formula": "adam", "weight_decay": 0.0, "lr": 0.001}),
        ("adamw", {"formula": "adam", "weight_decay": 0.01, "lr": 0.001}),
    ],
)
def test_each_optimizer_has_its_own_defaults(
    tmp_path: Path, name: str, expected: dict[str, Any]
) -> None:
    assert train(tmp_path, 1, "--optimizer", name).exit_code == 0
    assert expected.items() <= config_of(tmp_path).items()


HYPERPARAMETERS = {
    "weight_decay": 0.25,
    "beta_1": 0.8,
    "beta_2": 0.95,
    "epsilon": 1e-5,
    "clipnorm": 2.0,
    "clipvalue": 0.5,
}


def test_hyperparameters_that_are_given_are_the_runs_and_stay_so(tmp_path: Path) -> None:
    asked = [
        word for name, v in HYPERPARAMETERS.items() for word in (f"--{name.replace('_', '-')}", v)
    ]
    assert train(tmp_path, 1, "--optimizer", "adamw", *asked).exit_code == 0
    begun = config_of(tmp_path)
    assert {"formula": "adam", **HYPERPARAMETERS}.items() <= begun.items()
    for steps, again in enumerate(([], ["--optimizer", "adamw"], ["--beta-1", 0.8]), start=2):
        done = train(tmp_path, steps, *again)
        assert done.exit_code == 0, done.output
        assert config_of(tmp_path) == begun


def test_an_average_and_micro_batches_are_the_runs(tmp_path: Path) -> None:
    asked = ["--ema", 0.5, "--ema-overwrite-every", 3]
    assert train(tmp_path, 1, *asked).exit_code == 0
    expected = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3}
    assert expected.items() <= config_of(tmp_path).items()
    assert train(tmp_path, 2).exit_code == 0
    done = train(tmp_path, 3, "--accumulate", 2)
    assert (done.exit_code, "accumulate=2: task 'digits' must take" in done.stderr) == (1, True)


def test_a_global_clipnorm_is_the_runs(tmp_path: Path) -> None:
    assert train(tmp_path, 1, "--global-clipnorm", 2).exit_code == 0
    assert config_of(tmp_path)["global_clipnorm"] == 2.0


def test_what_fit_was_given_stays_where_the_command_resumes(tmp_path: Path) -> None:
    """Formulas and schedules too that no option can say."""
    rate = Sequential((Constant(0.1), 0.05), (3,))
    given = DistNadam(lr=rate, clipvalue=0.1, formula="adam_keras", sum_group=2)
    fit(
        Digits(),
        steps=1,
        optimizer=given,
        backend="local",
        checkpoint_dir=tmp_path,
        verbose=False,
    )
    begun = config_of(tmp_path)
    assert train(tmp_path, 2).exit_code == 0
    assert config_of(tmp_path) == begun
    assert train(tmp_path, 3, "--lr", 0.5).exit_code == 0
    assert config_of(tmp_path) == begun | {"lr": 0.5}


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("--optimizer nadam", "--optimizer adam", "formula='adam' (the run has 'nadam')"),
        ("", "--optimizer nadamw", "weight_decay=0.01 (the run has 0.0)"),
        ("--optimizer adamw", "--optimizer adam", "weight_decay=0.0 (the run has 0.01)"),
        ("--beta-1 0.8", "--beta-1 0.9", "beta_1=0.9 (the run has 0.8)"),
        ("", "--clipvalue 1", "clipvalue=1.0 (the run has None)"),
        ("--optimizer adam", "--weight-decay 0.1", "weight_decay=0.1 (the run has 0.0)"),
    ],
)
def test_another_optimizer_is_refused_by_what_differs(
    tmp_path: Path, first: str, then: str, message: str
) -> None:
    assert train(tmp_path, 1, *first.split()).exit_code == 0
    done = train(tmp_path, 2, *then.split())
    assert (done.exit_code, message in done.stderr) == (1, True), done.output
    assert "cannot change this" in done.stderr
    assert train(tmp_path, 2).exit_code == 0


def test_a_schedule_is_the_runs_until_another_rate_is_given(tmp_path: Path) -> None:
    text = "one-cycle:max_lr=0.01,total_steps=100"
    assert train(tmp_path, 1, "--lr-schedule", text, "--warmup-steps", 5).exit_code == 0
    begun = rate_to_dict(Warmup(OneCycle(0.01, 100), 5))
    for steps, again in enumerate(
        ([], ["--lr-schedule", text, "--warmup-steps", 5], ["--optimizer", "nadam"]), start=2
    ):
        assert train(tmp_path, steps, *again).exit_code == 0
        assert config_of(tmp_path)["lr"] == begun
    assert train(tmp_path, 5, "--lr-schedule", "constant:rate=0.5").exit_code == 0
    assert config_of(tmp_path)["lr"] == rate_to_dict(Constant(0.5))


def test_a_warm_up_goes_before_a_rate_too(tmp_path: Path) -> None:
    assert train(tmp_path, 1, "--lr", 0.5, "--warmup-steps", 5).exit_code == 0
    assert config_of(tmp_path)["lr"] == rate_to_dict(Warmup(0.5, 5))


def test_the_command_to_resume_repeats_the_optimizer(tmp_path: Path) -> None:
    asked = "--optimizer adamw --lr-schedule polynomial:initial=0.1,total_steps=9 "
    asked += "--warmup-steps 2 --weight-decay 0.5 --beta-1 0.8"
    run = tmp_path / "run"
    path = interrupted_task(tmp_path)
    path = path.rename(path.with_name("interrupted_optimizer.py"))
    words = ["train", f"{path}:Interrupted", *TRAIN[2:], "--steps", 3, "--checkpoint-dir", run]
    done = call(*words, *asked.split())
    assert done.exit_code == 130, done.output
    resume = done.stderr.splitlines()[-1].removeprefix("distnadam: to go on: ")
    assert asked in resume
    assert "--epsilon" not in resume
    assert call(*shlex.split(resume)[1:], "--json", "--quiet").exit_code == 0
    config = config_of(run)
    assert (config["formula"], config["weight_decay"], config["beta_1"]) == ("adam", 0.5, 0.8)
    assert config["lr"] == rate_to_dict(Warmup(Polynomial(0.1, 9), 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant:rate=0.1", Constant(0.1)),
        ("cosine-restarts:peak=0.1,period=10,growth=2", CosineRestarts(0.1, 10, 2)),
        (
            "exponential:initial=0.1,decay_steps=10,decay_rate=0.5,staircase=True",
            Exponential(0.1, 10, 0.5, True),
        ),
        ("inverse-square-root:peak=1e-3,timescale=4000", InverseSquareRoot(1e-3, 4000)),
        (
            "one-cycle:max_lr=0.1,total_steps=9,anneal_strategy=linear,three_phase=false",
            OneCycle(0.1, 9, anneal_strategy="linear"),
        ),
        ("piecewise:boundaries=5/10,rates=0.3/0.2/0.1", Piecewise((5, 10), (0.3, 0.2, 0.1))),
        ("piecewise:boundaries=,rates=0.3", Piecewise((), (0.3,))),
        ("polynomial:total_steps=9,initial=0.1", Polynomial(0.1, 9)),
        ("warmup-cosine:peak=0.1,warmup_steps=1,total_steps=9", WarmupCosine(0.1, 1, 9)),
    ],
)
def test_a_schedule_is_written_by_its_name_and_fields(text: str, expected: Schedule) -> None:
    assert schedule_of(text) == expected


FIELDS = (
    "its fields are max_lr,total_steps,pct_start=0.3,anneal_strategy=cos,div_factor=25,"
    "final_div_factor=10000,three_phase=false"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two-cycle", "there is no schedule 'two-cycle'; known are constant, cosine-restarts, "),
        ("one-cycle", f"one-cycle: max_lr, total_steps must be given; {FIELDS}"),
        ("one-cycle:max_lr=0.1", f"one-cycle: total_steps must be given; {FIELDS}"),
        ("one-cycle:peak=0.1", f"one-cycle: it has no field 'peak'; {FIELDS}"),
        ("one-cycle:max_lr", f"one-cycle: 'max_lr' is not FIELD=VALUE; {FIELDS}"),
        ("one-cycle:max_lr=1,max_lr=2", f"one-cycle: max_lr is given twice; {FIELDS}"),
        ("one-cycle:max_lr=high", "max_lr must be a finite number, got 'high'"),
        ("one-cycle:max_lr=nan", "max_lr must be a finite number, got 'nan'"),
        ("one-cycle:max_lr=1,total_steps=1e3", "total_steps must be a whole number, got '1e3'"),
        ("one-cycle:three_phase=1", "three_phase must be true or false, got '1'"),
        (
            "one-cycle:max_lr=1,total_steps=0",
            f"one-cycle: total_steps must be a whole number of at least 1, got 0; {FIELDS}",
        ),
        (
            "piecewise:boundaries=1/x,rates=1/2",
            "boundaries must be whole numbers with / between them, got '1/x'",
        ),
        ("constant:rate=-1", "constant: lr at step 0 must be finite and at least 0, got -1.0"),
    ],
)
def test_a_schedule_that_is_none_is_refused_with_its_fields(text: str, message: str) -> None:
    with pytest.raises(click.BadParameter) as raised:
        schedule_of(text)
    assert message in str(raised.value)
    assert str(raised.value).startswith(repr(text))


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        (["--lr", 0.1, "--lr-schedule", "constant:rate=1"], 2, "--lr 0.1 and --lr-schedule const"),
        (["--warmup-steps", 5], 2, "--warmup-steps 5: give the rate that follows too"),
        (["--lr", -1, "--warmup-steps", 5], 1, "Warmup: schedule must be finite and at least 0"),
        (["--lr-schedule", "two-cycle"], 2, "Invalid value for --lr-schedule: 'two-cycle': there"),
        (["--optimizer", "sgd"], 2, "'sgd' is not one of 'nadam', 'nadamw', 'adam', 'adamw'"),
        (["--beta-1", 1], 1, "beta_1 must be in [0, 1), got 1.0"),
        (["--clipnorm", 1, "--global-clipnorm", 1], 1, "cannot both be set"),
    ],
)
def test_options_that_contradict_each_other_or_are_out_of_range_are_refused(
    tmp_path: Path, asked: list[Any], code: int, message: str
) -> None:
    done = train(tmp_path / "run", 1, *asked)
    assert (done.exit_code, message in " ".join(done.stderr.split())) == (code, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_help_lists_every_option_once_under_a_purpose() -> None:
    listed = [name for names in _SECTIONS.values() for name in names]
    options = [p.name for p in main.commands["train"].params if isinstance(p, click.Option)]
    assert sorted(listed) == sorted(map(str, options))
    shown = call("train", "--help").stdout
    assert all(f"\n{title}:\n" in shown for title in _SECTIONS)
    assert all(shown.count(f"\n  {name} ") == 1 for name, _ in SCHEDULE_ROWS)


def test_a_command_line_can_say_every_schedule_but_those_of_others() -> None:
    kinds = {name for name in schedules.__all__ if isinstance(getattr(schedules, name), type)}
    said = {name.title().replace("-", "") for name, _ in SCHEDULE_ROWS}
    assert kinds - said == {"Schedule", "Sequential", "Warmup"}
