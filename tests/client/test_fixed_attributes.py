"""Attributes that are no settings are refused, and whatever state an object is in, it says so."""

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import distnadam
from distnadam import DistNadam, Worker
from distnadam.errors import ConfigError, LifecycleError, NoSuchSetting, StepTimeout
from distnadam.schedules import Constant

PARAMS = {"w": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("learning_rate", r"set lr, of the optimizer: optimizer.lr"),
        ("clipnorm", r"call set_config, of the optimizer: optimizer.set_config\(clipnorm="),
        ("betas", r"optimizer.set_config\(beta_1="),
        ("formula", r"fixed when the optimizer is made: DistNadam\(formula="),
        ("num_shards", r"DistNadam\(num_shards="),
        ("step_timeout_s", r"DistNadam\(options=Options\(step_timeout_s="),
        ("options", r"DistNadam\(options="),
        ("iterations", "given by the state, which set_params and set_weights replace"),
        ("restored_data", "given by the state"),
        ("learning_rat", "did you mean lr?"),
        ("clip_norm", "did you mean clipnorm?"),
        ("nothing_like_it", "there is no such attribute"),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_an_attribute_that_is_no_setting_is_refused_with_the_right_way(
    built: bool, name: str, remedy: str
) -> None:
    optimizer = DistNadam(backend="local")
    if built:
        optimizer.build(PARAMS)
    before = optimizer.get_config()
    with pytest.raises(NoSuchSetting, match=rf"^DistNadam.{name} cannot be set: .*{remedy}"):
        setattr(optimizer, name, 0.5)
    assert optimizer.get_config() == before
    optimizer.lr = 0.5
    assert optimizer.lr == 0.5
    optimizer.close()


@pytest.mark.parametrize("name", ["lr", "learning_rate", "rank", "round", "session", "batch"])
def test_a_worker_refuses_them_too(name: str) -> None:
    with (
        DistNadam(backend="local").build(PARAMS) as optimizer,
        optimizer.worker(0) as worker,
        pytest.raises(NoSuchSetting, match=rf"^Worker.{name} cannot be set"),
    ):
        setattr(worker, name, 1)


def test_a_subclass_may_declare_attributes_of_its_own() -> None:
    class Mine(DistNadam, set_once={"notes"}):
        colour = "red"

    optimizer = Mine()
    optimizer.colour = "blue"
    optimizer.notes = []  # type: ignore[attr-defined]
    assert (optimizer.colour, optimizer.restored_data) == ("blue", {})


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_an_optimizer_that_is_not_built_is_copied_with_its_settings(again: Any) -> None:
    optimizer = DistNadam(lr=Constant(0.5), clipnorm=1.0, num_workers=2, backend="local")
    twin = again(optimizer)
    assert twin.get_config() == optimizer.get_config()
    with twin.build(PARAMS):
        assert "not built" in repr(optimizer)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_built_local_or_closed_optimizer_refuses_to_be_copied_in_a_sentence(again: Any) -> None:
    with DistNadam(backend="local").build(PARAMS) as optimizer:
        with pytest.raises(LifecycleError, match="cannot be copied or pickled; use backend='ray'"):
            again(optimizer)
        with pytest.raises(LifecycleError, match="worker lives in its process"):
            again(optimizer.worker(0))
    with pytest.raises(LifecycleError, match="this optimizer was closed"):
        again(optimizer)


def test_objects_in_every_state_say_what_they_are() -> None:
    assert repr(DistNadam.__new__(DistNadam)) == "<DistNadam: not made>"
    assert repr(Worker.__new__(Worker)) == "<Worker: not made>"
    optimizer = DistNadam(lr=0.5, num_workers=2, backend="local")
    assert repr(optimizer) == (
        "<DistNadam: not built, lr=0.5, backend='local', num_shards=1, num_workers=2>"
    )
    optimizer.build(PARAMS)
    assert repr(optimizer).endswith("num_workers=2, 1 tensors of 3 elements>")
    worker = optimizer.worker(0)
    ticket = worker.push(PARAMS)
    assert repr(worker) == "<Worker: rank 0, round 0>"
    assert repr(ticket) == "<Ticket: push of rank 0 for round 1, under way>"
    optimizer.worker(1).push(PARAMS)
    ticket.result()
    assert repr(ticket) == "<Ticket: push of rank 0 for round 1, decided>"
    worker.close()
    assert repr(worker) == "<Worker: rank 0, closed>"
    optimizer.close()
    assert repr(optimizer).startswith("<DistNadam: closed, ")


def test_objects_in_every_state_can_be_inspected() -> None:
    optimizer = DistNadam(backend="local")
    assert dict(inspect.getmembers(optimizer))["lr"] == 0.002
    worker = optimizer.build(PARAMS).worker(0)
    ticket = worker.push(PARAMS)
    for close in (lambda: None, worker.close, optimizer.close):
        close()
        for item in (optimizer, worker, ticket):
            assert inspect.getmembers(item)
    assert not hasattr(optimizer, "iterations")


def test_a_ticket_waits_as_long_as_it_is_told() -> None:
    with DistNadam(num_workers=2, backend="local").build(PARAMS) as optimizer:
        worker, other = optimizer.worker(0), optimizer.worker(1)
        ticket = worker.push(PARAMS)
        for timeout_s in (0, 0.01):
            with pytest.raises(StepTimeout, match=rf"not decided in {timeout_s:g} s; .* ranks 1"):
                ticket.result(timeout_s=timeout_s)
        for wrong in (-1, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="timeout_s must be a finite number"):
                ticket.result(timeout_s=wrong)
        other.push(PARAMS)
        assert ticket.result(timeout_s=60) == 1


def test_the_package_says_its_version() -> None:
    assert distnadam.__version__.split(".")[0].isdigit()
