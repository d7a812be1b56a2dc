"""The configuration: bad values are named, plain data round-trips, nothing is coerced silently."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from distnadam.checks import check_count
from distnadam.config import Options, Topology
from distnadam.errors import ConfigError
from distnadam.hyperparameters import NadamConfig
from distnadam.schedules import WarmupCosine
from distnadam.training.fit import fit
from distnadam.training.tasks.digits import Digits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": math.inf}, "lr must be finite and at least 0, got inf"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"beta_1": 1.0}, r"beta_1 must be in \[0, 1\), got 1.0"),
        ({"beta_2": -0.1}, "beta_2 must be finite and at least 0, got -0.1"),
        ({"epsilon": math.nan}, "epsilon must be finite and at least 0, got nan"),
        ({"schedule_decay": -1}, "schedule_decay must be finite and at least 0, got -1"),
        ({"clipnorm": -1.0}, "clipnorm must be finite and at least 0, got -1.0"),
        ({"clipvalue": math.inf}, "clipvalue must be finite and at least 0, got inf"),
        ({"sum_group": 0}, "sum_group must be a whole number of at least 1, got 0"),
        ({"sum_group": 2.0}, "sum_group must be a whole number of at least 1, got 2.0"),
        ({"formula": "adamax"}, "formula must be one of 'nadam', .*, got 'adamax'"),
        ({"formula": ["adam"]}, r"formula must be one of .*, got \['adam'\]"),
        (
            {"formula": "adam", "schedule_decay": 0.1},
            "schedule_decay=0.1 has no effect with formula='adam'",
        ),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, got -0.1"),
        ({"weight_decay": None}, "weight_decay must be a number, got None"),
        ({"decoupled_weight_decay": 1}, "decoupled_weight_decay must be True or False, got 1"),
        ({"maximize": "no"}, "maximize must be True or False, got 'no'"),
        (
            {"clipnorm": 1.0, "global_clipnorm": 2.0},
            "clipnorm=1.0 and global_clipnorm=2.0 cannot both be set",
        ),
    ],
)
def test_a_bad_hyper_parameter_is_named_with_its_value(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        NadamConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be .* got 'ignore'"),
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"shard_cpus": -1}, "shard_cpus must be finite and at least 0, got -1"),
        ({"step_timeout_s": "fast"}, "step_timeout_s must be a number, got 'fast'"),
        ({"start_timeout_s": math.inf}, "start_timeout_s must be finite"),
        ({"shard_resources": [("a", 1)]}, "shard_resources must be a mapping"),
        (
            {"shard_resources": {"a": -1}},
            r"shard_resources\['a'\] must be finite and at least 0, got -1",
        ),
        ({"label_selector": {"a": 1}}, r"label_selector\['a'\] must be a string, got 1"),
        ({"worker_label_selector": ["a=b"]}, r"worker_label_selector must be a mapping"),
        ({"spread": "no"}, "spread must be one of True, False, got 'no'"),
        (
            {"shard_memory_bytes": 1.5},
            "shard_memory_bytes must be a whole number of at least 0, got 1.5",
        ),
    ],
)
def test_a_bad_option_is_named_with_its_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**arguments)


def test_a_config_and_options_come_back_from_plain_data() -> None:
    config = NadamConfig(WarmupCosine(0.1, 5, 10), clipnorm=1.0, clipvalue=0.5)
    assert NadamConfig.from_dict(config.to_dict()) == config
    other = NadamConfig(formula="adam_keras", weight_decay=0.1, maximize=True)
    assert NadamConfig.from_dict(other.to_dict()) == other
    options = Options(threads=2, shard_resources={"fast_disk": 1.0}, start_timeout_s=3.0)
    assert Options.of(options.to_dict()) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [(5, "options must be Options, got 5"), ({"foo": 1}, "there is no option 'foo'")],
)
def test_options_of_another_type_or_name_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.of(options)


def test_numpy_numbers_become_plain_ones() -> None:
    options = Options(threads=np.int64(2), step_timeout_s=np.float32(5))  # type: ignore[arg-type]
    assert (type(options.threads), type(options.step_timeout_s)) == (int, float)
    with pytest.raises(ConfigError, match="lr must be a number, got array"):
        NadamConfig(lr=np.array([0.1, 0.2]))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, 1.5, "2", None, 0, -1])
def test_a_bad_count_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="num_shards must be a whole number of at least 1"):
        check_count("num_shards", value)


@pytest.mark.parametrize("name", ["num_shards", "num_workers"])
def test_more_processes_than_a_list_can_have_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at most 65536, got"):
        Topology(**{name: 10**9})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["seed", "steps", "save_every", "evaluate_every", "keep"])
def test_a_number_that_no_checkpoint_holds_is_refused_before_the_run(name: str) -> None:
    given: Any = {"steps": 1, name: 2**63}
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at most 92233"):
        fit(Digits(), backend="local", verbose=False, **given)


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        (7000, "port_range must be two ports, the first and the last, got 7000"),
        ((7000,), "port_range must be two ports, the first and the last"),
        ((0, 5), "port_range must be two ports, the first and the last"),
        ((7002, 7001), "port_range must be two ports in order, at most 65535"),
        ((7000, 70000), "port_range must be two ports in order, at most 65535"),
        (("a", "b"), "port_range must be two ports, the first and the last"),
    ],
)
def test_ports_that_are_none_are_refused_by_name(ports: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Options(port_range=ports)


def test_ports_come_back_from_plain_data() -> None:
    options = Options(port_range=[7000, 7010])  # type: ignore[arg-type]
    assert options.port_range == (7000, 7010)
    assert Options.of(json.loads(json.dumps(options.to_dict()))) == options
