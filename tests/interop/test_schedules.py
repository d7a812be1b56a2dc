"""Each schedule has the rates of torch's and of optax's, step by step, to their rounding."""

from collections.abc import Callable
from typing import Any

import pytest

from distnadam.schedules import (
    Constant,
    CosineRestarts,
    Exponential,
    OneCycle,
    Piecewise,
    Polynomial,
    Schedule,
    Sequential,
    Warmup,
    WarmupCosine,
)

pytestmark = pytest.mark.slow

PEAK = 0.1


def of_torch(make: Callable[[Any, Any], Any], steps: int) -> list[float]:
    """The rates that a scheduler of torch gives the first steps of an optimizer."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(
    ("total", "pct"), [(100, 0.3), (101, 0.25), (37, 0.41), (1000, 0.5), (50, 0.0), (1, 0.3)]
)
def test_one_cycle_is_torchs(total: int, pct: float, anneal: Any, three_phase: bool) -> None:
    theirs = of_torch(
        lambda schedulers, optimizer: schedulers.OneCycleLR(
            optimizer,
            max_lr=0.3,
            total_steps=total,
            pct_start=pct,
            anneal_strategy=anneal,
            cycle_momentum=False,
            div_factor=10.0,
            final_div_factor=1e3,
            three_phase=three_phase,
        ),
        total,
    )
    ours = OneCycle(0.3, total, pct, anneal, 10.0, 1e3, three_phase)
    # the sum of 1 and a cosine near -1 has the rounding of the largest rate
    assert [ours(step) for step in range(total)] == pytest.approx(theirs, rel=1e-12, abs=1e-16)


@pytest.mark.parametrize(("period", "growth", "final"), [(10, 1, 0.0), (7, 2, 0.01), (1, 3, 0.0)])
def test_cosine_restarts_are_torchs(period: int, growth: int, final: float) -> None:
    theirs = of_torch(
        lambda schedulers, optimizer: schedulers.CosineAnnealingWarmRestarts(
            optimizer, T_0=period, T_mult=growth, eta_min=final
        ),
        200,
    )
    ours = CosineRestarts(PEAK, period, growth, final)
    assert [ours(step) for step in range(200)] == pytest.approx(theirs, rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.5])
def test_a_polynomial_is_torchs(power: float) -> None:
    theirs = of_torch(
        lambda schedulers, optimizer: schedulers.PolynomialLR(
            optimizer, total_iters=60, power=power
        ),
        70,
    )
    ours = Polynomial(PEAK, 60, power)
    # torch multiplies the rate before, so roundings add up
    assert [ours(step) for step in range(70)] == pytest.approx(theirs, rel=1e-12, abs=1e-16)


def test_a_warm_up_is_torchs() -> None:
    theirs = of_torch(
        lambda schedulers, optimizer: schedulers.SequentialLR(
            optimizer,
            [
                schedulers.LinearLR(optimizer, start_factor=0.25, total_iters=8),
                schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=20, T_mult=2),
            ],
            milestones=[8],
        ),
        100,
    )
    ours = Warmup(CosineRestarts(PEAK, 20, 2), 8, initial=PEAK / 4)
    assert [ours(step) for step in range(100)] == pytest.approx(theirs, rel=1e-12, abs=1e-16)


def optax_rates(make: Callable[[Any], Any], steps: int) -> list[float]:
    optax = pytest.importorskip("optax")
    schedule = make(optax)
    return [float(schedule(step)) for step in range(steps)]


def joined(optax: Any) -> Any:
    return optax.join_schedules(
        [
            optax.linear_schedule(0.01, 0.1, 10),
            optax.polynomial_schedule(0.1, 0.02, 3.0, 30),
            optax.exponential_decay(0.02, 5, 0.5),
        ],
        [10, 50],
    )


def restarts(optax: Any) -> Any:
    return optax.sgdr_schedule(
        [
            {
                "init_value": 0.0,
                "peak_value": PEAK,
                "decay_steps": length,
                "warmup_steps": 0,
                "end_value": 0.01,
            }
            for length in (10, 20, 40)
        ]
    )


@pytest.mark.parametrize(
    ("ours", "make"),
    [
        (Constant(PEAK), lambda optax: optax.constant_schedule(PEAK)),
        (
            Polynomial(0.1, 60, 2.5, 0.01),
            lambda optax: optax.polynomial_schedule(0.1, 0.01, 2.5, 60),
        ),
        (Polynomial(0.01, 60, final=0.1), lambda optax: optax.linear_schedule(0.01, 0.1, 60)),
        (Exponential(0.1, 10, 0.5), lambda optax: optax.exponential_decay(0.1, 10, 0.5)),
        (
            Warmup(WarmupCosine(0.1, 0, 50, 0.01), 20, initial=0.0),
            lambda optax: optax.warmup_cosine_decay_schedule(0.0, 0.1, 20, 70, 0.01),
        ),
        (CosineRestarts(PEAK, 10, 2, 0.01), restarts),
        (
            Sequential(
                (
                    Polynomial(0.01, 10, final=0.1),
                    Polynomial(0.1, 30, 3.0, 0.02),
                    Exponential(0.02, 5, 0.5),
                ),
                (10, 50),
            ),
            joined,
        ),
        (
            Piecewise((9, 19), (0.1, 0.05, 0.01)),  # Keras's boundary is the last step before
            lambda optax: optax.piecewise_constant_schedule(0.1, {10: 0.5, 20: 0.2}),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "optax",
)
def test_a_schedule_is_optaxs(ours: Schedule, make: Callable[[Any], Any]) -> None:
    steps = 70 if isinstance(ours, CosineRestarts) else 100  # as many as optax is given periods
    theirs = optax_rates(make, steps)
    assert [ours(step) for step in range(steps)] == pytest.approx(theirs, rel=1e-6)
