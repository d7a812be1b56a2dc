"""The step's scalars against the design's formulas written out, over many steps; and powers and
cosines against the C library's.
"""

import _pydecimal
import decimal
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import reproducible_math
from distnadam.hyperparameters import Formula, NadamConfig
from distnadam.nadam.step_scalars import NONE, Clock, step_scalars
from distnadam.schedules import Exponential


def ulps(a: float, b: float) -> float:
    return abs(a - b) / math.ulp(max(abs(a), abs(b), sys.float_info.min))


@pytest.mark.parametrize(
    "config",
    [
        NadamConfig(),
        NadamConfig(0.1, 0.5, 0.9, 1e-3, 1.0),
        NadamConfig(beta_1=0.0, beta_2=0.0, schedule_decay=0.0),
    ],
)
def test_the_scalars_are_those_of_the_formulas(config: NadamConfig) -> None:
    clock, schedule = Clock(), 1.0
    for t in range(1, 200):
        mu = config.beta_1 * (1 - 0.5 * 0.96 ** (t * config.schedule_decay))
        mu_next = config.beta_1 * (1 - 0.5 * 0.96 ** ((t + 1) * config.schedule_decay))
        schedule *= mu
        root = math.sqrt(1 - config.beta_2**t)
        scalars = step_scalars(clock, config)
        clock = scalars.after
        assert clock.iterations == t
        assert clock.m_schedule == pytest.approx(schedule, rel=1e-12)
        expected = (
            config.lr * (1 - mu) / (1 - schedule) * root,  # type: ignore[operator]
            config.lr * mu_next / (1 - schedule * mu_next) * root,  # type: ignore[operator]
            config.epsilon * root,
            1 - config.beta_1,
            1 - config.beta_2,
            NONE,
            NONE,
            NONE,
        )
        assert scalars.coefficients == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("formula", ["nadam_optax", "nadam_algoperf", "adam", "adam_keras"])
def test_the_scalars_of_a_constant_momentum_are_those_of_the_formulas(formula: Formula) -> None:
    config = NadamConfig(0.1, 0.8, 0.9, 1e-3, formula=formula)
    clock = Clock()
    for t in range(1, 100):
        root = math.sqrt(1 - 0.9**t)
        c_g, c_m = {
            "nadam_optax": (0.1 * 0.2 / (1 - 0.8**t), 0.1 * 0.8 / (1 - 0.8 ** (t + 1))),
            "nadam_algoperf": (0.1 * 0.2 / (1 - 0.8**t), 0.1 * 0.8 / (1 - 0.8**t)),
        }.get(formula, (NONE, 0.1 / (1 - 0.8**t)))
        epsilon = 1e-3 if formula == "adam_keras" else 1e-3 * root
        scalars = step_scalars(clock, config)
        clock = scalars.after
        assert clock == Clock(t, pytest.approx(0.8**t, rel=1e-12))
        expected = (c_g * root, c_m * root, epsilon, 1 - 0.8, 1 - 0.9, NONE, NONE, NONE)
        assert scalars.coefficients == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_decay_is_by_the_rate_of_the_step_or_by_the_gradient() -> None:
    rate = Exponential(1.0, 1, 0.5)
    decoupled = NadamConfig(rate, weight_decay=0.1)
    coupled = NadamConfig(rate, weight_decay=0.1, decoupled_weight_decay=False)
    for done in range(4):
        clock = Clock(done, 0.5)
        *_, decay, l2, _ = step_scalars(clock, decoupled).coefficients
        assert decay == 0.5**done * 0.1
        assert math.isnan(l2)
        *_, decay, l2, _ = step_scalars(clock, coupled).coefficients
        assert l2 == 0.1
        assert math.isnan(decay)


def test_the_rate_follows_the_number_of_steps_applied() -> None:
    config = NadamConfig(lr=Exponential(1.0, 1, 0.5))
    assert [step_scalars(Clock(done, 0.5), config).lr for done in range(4)] == [
        1.0,
        0.5,
        0.25,
        0.125,
    ]


@given(base=st.floats(1e-6, 1.0), exponent=st.floats(0.0, 1e5))
def test_a_power_is_within_one_unit_of_the_c_librarys(base: float, exponent: float) -> None:
    ours, theirs = reproducible_math.power(base, exponent), math.pow(base, exponent)
    assert ulps(ours, theirs) <= 1.0 or max(ours, theirs) < sys.float_info.min


@given(base=st.floats(0.5, 1.0), exponent=st.integers(1, 10**6))
def test_a_power_does_not_depend_on_which_decimal_is_installed(base: float, exponent: int) -> None:
    context = _pydecimal.Context(prec=40, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
    if base < 1.0:
        expected = context.exp(
            context.multiply(_pydecimal.Decimal(exponent), context.ln(_pydecimal.Decimal(base)))
        )
        assert reproducible_math.power(base, float(exponent)) == float(str(expected))


@given(base=st.floats(0.5, 1.0), rate=st.floats(0.0, 1.0), step=st.integers(0, 10**7))
def test_a_power_of_a_step_is_that_power_and_not_what_was_asked_before(
    base: float, rate: float, step: int
) -> None:
    got = reproducible_math.power_of_step(base, rate, step)
    assert (
        ulps(got, reproducible_math.power(base, rate * step))
        <= 1.0 + abs(rate * step * math.log(base))
        or got < sys.float_info.min
    )
    reproducible_math._factor.cache_clear()
    assert reproducible_math.power_of_step(base, rate, step) == got


@given(fraction=st.floats(0.0, 1.0))
def test_a_cosine_is_within_the_c_librarys_rounding_of_its_argument(fraction: float) -> None:
    assert reproducible_math.cosine_of_pi_times(fraction) == pytest.approx(
        math.cos(math.pi * fraction), abs=4e-16
    )


@pytest.mark.parametrize(
    ("base", "exponent", "expected"),
    [(0.0, 0.0, 1.0), (0.0, 3.0, 0.0), (1.0, 1e9, 1.0), (0.96, 0.0, 1.0)],
)
def test_powers_at_the_edges(base: float, exponent: float, expected: float) -> None:
    assert reproducible_math.power(base, exponent) == expected


def test_what_has_no_power_or_cosine_here_is_refused() -> None:
    with pytest.raises(ValueError, match=r"base must be at least 0, got -1\.0"):
        reproducible_math.power(-1.0, 2.0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
        reproducible_math.cosine_of_pi_times(1.5)
