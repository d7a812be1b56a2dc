"""Learning-rate schedules: their values, plain data and back, and refusals."""

import math
from dataclasses import dataclass

import pytest

from distnadam.errors import ConfigError
from distnadam.schedules import (
    Constant,
    Exponential,
    Piecewise,
    Schedule,
    WarmupCosine,
    rate_at,
    rate_from,
    rate_to_dict,
)

ALL = [
    Constant(0.1),
    Exponential(0.1, 10, 0.9),
    Exponential(0.1, 10, 0.9, staircase=True),
    WarmupCosine(0.1, 10, 110, 0.01),
    Piecewise((5, 10), (0.3, 0.2, 0.1)),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.1), {0: 0.1, 10**6: 0.1}),
        (Exponential(0.1, 10, 0.5), {0: 0.1, 10: 0.05, 5: 0.1 * 0.5**0.5}),
        (
            Exponential(0.1, 10, 0.5, staircase=True),
            {0: 0.1, 9: 0.1, 10: 0.05, 19: 0.05, 20: 0.025},
        ),
        (WarmupCosine(1.0, 4, 104, 0.5), {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.75, 104: 0.5, 10**6: 0.5}),
        (WarmupCosine(1.0, 0, 10), {0: 1.0, 5: 0.5, 10: 0.0}),
        (Piecewise((5, 10), (3.0, 2.0, 1.0)), {0: 3.0, 5: 3.0, 6: 2.0, 10: 2.0, 11: 1.0}),
        (Piecewise((), (3.0,)), {0: 3.0, 99: 3.0}),
    ],
    ids=repr,
)
def test_values_at_the_turning_points(schedule: Schedule, values: dict[int, float]) -> None:
    assert {step: schedule(step) for step in values} == {
        step: pytest.approx(value, rel=1e-14, abs=1e-16) for step, value in values.items()
    }


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_schedule_goes_to_plain_data_and_back(schedule: Schedule) -> None:
    plain = rate_to_dict(schedule)
    assert isinstance(plain, dict)
    assert all(isinstance(value, (int, float, bool, list)) for value in plain["config"].values())
    assert rate_from(plain) == schedule


def test_a_users_schedule_is_registered_when_it_is_defined() -> None:
    @dataclass(frozen=True)
    class Halving(Schedule):
        start: float

        def __call__(self, step: int) -> float:
            return self.start / 2**step

    assert rate_from(rate_to_dict(Halving(1.0)))(3) == 0.125  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0.1, 0, 0.9), "Exponential: decay_steps must be at least 1, got 0"),
        (lambda: Exponential(0.1, 1, -0.9), "Exponential: decay_rate must be at least 0, got -0.9"),
        (
            lambda: WarmupCosine(0.1, -1, 10),
            "WarmupCosine: warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: WarmupCosine(0.1, 10, 10),
            "WarmupCosine: total_steps must be more than warmup_steps, got 10",
        ),
        (
            lambda: Piecewise((1, 2), (0.1, 0.2)),
            r"Piecewise: rates must be one longer than boundaries, got \(0.1, 0.2\)",
        ),
        (
            lambda: Piecewise((2, 1), (0.1, 0.2, 0.3)),
            r"Piecewise: boundaries must be increasing, got \(2, 1\)",
        ),
        (
            lambda: rate_at(lambda step: math.nan, 7),
            "lr at step 7 must be finite and at least 0, got nan",
        ),
        (
            lambda: rate_at(Constant(-1.0), 0),
            "lr at step 0 must be finite and at least 0, got -1.0",
        ),
        (
            lambda: rate_from({"class_name": "Cubic", "config": {}}),
            "lr: unknown schedule 'Cubic'; known are .*WarmupCosine",
        ),
        (
            lambda: rate_from({"class_name": "Constant", "config": {"x": 1}}),
            "lr: schedule Constant does not take {'x': 1}",
        ),
        (
            lambda: rate_to_dict(lambda step: 0.1),
            "is a plain function, which a checkpoint cannot store",
        ),
    ],
)
def test_a_bad_schedule_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()
