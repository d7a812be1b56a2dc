"""Law 7: set_weights(get_weights()) and from_config(get_config()) change nothing, to the bit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import DistNadam, Options
from distnadam.schedules import Constant, Exponential, Piecewise, WarmupCosine
from tests.models import bits, params, run

RATES = [
    0.002,
    0.1,
    Constant(0.01),
    Exponential(0.01, 10, 0.9),
    WarmupCosine(0.01, 3, 20),
    Piecewise((2, 4), (0.1, 0.01, 0.001)),
]


@pytest.mark.on_ray(slow=["ray"])
def test_set_weights_of_get_weights_changes_nothing_and_neither_does_what_follows(
    backend: str,
) -> None:
    with DistNadam(num_shards=3, num_workers=2, backend=backend).build(params()) as optimizer:
        run(optimizer, 0, 3)
        before = bits(optimizer)
        optimizer.set_weights(optimizer.get_weights())
        assert bits(optimizer) == before
        run(optimizer, 3, 5)
        after = bits(optimizer)
    with DistNadam(num_workers=2, backend="local").build(params()) as optimizer:
        run(optimizer, 0, 5)
        assert bits(optimizer) == after


def test_parameters_that_workers_see_rounded_are_got_and_set_unrounded() -> None:
    kernel = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    with DistNadam(num_shards=3, backend="local", pull_dtype="bfloat16").build([kernel]) as one:
        worker = one.worker(0)
        seen = worker.step([kernel])[0].tobytes()
        before = bits(one)
        one.set_params(one.get_params())
        one.set_weights(one.get_weights())
        assert bits(one) == before
        assert worker.pull()[0].tobytes() == seen
        master = one.get_params()[0]
        assert master.astype(ml_dtypes.bfloat16).tobytes() == seen
        assert not np.array_equal(master.astype(ml_dtypes.bfloat16), master)


def test_weights_and_parameters_move_to_another_optimizer_whole(backend: str) -> None:
    with (
        DistNadam(num_shards=2, num_workers=2, backend=backend).build(params()) as one,
        DistNadam(num_shards=3, num_workers=2, backend="local").build(params(seed=1)) as other,
    ):
        run(one, 0, 2)
        other.set_params(one.get_params())
        other.set_weights(one.get_weights())
        assert bits(one) == bits(other)
        run(other, 2, 3)
        one.set_params(other.get_params())
        one.set_weights(other.get_weights())
        assert bits(one) == bits(other)


@pytest.mark.parametrize("lr", RATES, ids=str)
def test_from_config_of_get_config_is_the_same_optimizer(lr: object) -> None:
    asked = DistNadam(
        lr=lr,
        beta_1=0.8,
        clipnorm=1.0,
        sum_group=2,
        pull_dtype="bfloat16",
        num_shards=3,
        num_workers=4,
        backend="local",
        options=Options(threads=1),
    )
    again = DistNadam.from_config(asked.get_config())
    assert again.get_config() == asked.get_config()
    assert again.lr == lr
    ends = []
    for optimizer in (asked, again):
        with optimizer.build(params()):
            run(optimizer, 0, 3, num_workers=4)
            ends.append(bits(optimizer))
    assert ends[0] == ends[1]


def test_the_defaults_are_the_references() -> None:
    config = DistNadam().get_config()
    assert {k: config[k] for k in ("lr", "beta_1", "beta_2", "epsilon", "schedule_decay")} == {
        "lr": 0.002,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-7,
        "schedule_decay": 0.004,
    }
    assert config["sum_group"] == 1


@given(iterations=st.integers(0, 10**6), m_schedule=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_weights_set_are_the_weights_got(iterations: int, m_schedule: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with DistNadam(num_shards=3, backend="local").build(
        {"a": np.ones(3000, np.float32), "b": np.float64(1)}
    ) as optimizer:
        moments = [
            np.abs(rng.standard_normal(s)).astype(d) for s, d in (((3000,), "f4"), ((), "f8")) * 2
        ]
        given = [np.array(iterations), np.array(m_schedule), *moments]
        optimizer.set_weights(given)
        assert [np.asarray(x).tobytes() for x in optimizer.get_weights()] == [
            np.asarray(x).tobytes() for x in given
        ]
