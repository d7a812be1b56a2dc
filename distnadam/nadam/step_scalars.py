"""The scalars of one step, in float64, from the step's number: the momentum schedule and the bias
corrections.

Pure functions of two numbers of the whole optimizer, `iterations` and `m_schedule`; every shard
computes the same bits (`exact`).
"""

import math
from dataclasses import dataclass

from distnadam.config import NadamConfig
from distnadam.reproducible_math import power_of_step
from distnadam.schedules import rate_at


@dataclass(frozen=True)
class Clock:
    """How far the optimizer is: steps applied, and the product of the momentum coefficients so far
    (1 before the first).
    """

    iterations: int = 0
    m_schedule: float = 1.0


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class StepScalars:
    """What one step needs beside the arrays.

    Attributes:
        lr: the learning rate.
        coefficients: of the gradient, of the momentum, epsilon, and the weights of the gradient in
            the first and of its square in the second moment.
        after: the clock after the step.

    The second moment's correction ``r = 1 / sqrt(1 - beta_2**t)`` is folded into the first three
    coefficients, which are c_g / r, c_m / r and epsilon / r, so that a kernel computes ``p -=
    (gradient*g + momentum*m) / (sqrt(v) + epsilon)`` with one multiplication less per element.
    """

    lr: float
    coefficients: tuple[float, float, float, float, float]
    after: Clock


def step_scalars(clock: Clock, config: NadamConfig) -> StepScalars:
    """Return the scalars of the step that follows `clock`.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (2016), with the schedule of
    tf.keras.optimizers.Nadam (TensorFlow 1.13).

    Raises:
        ConfigError: the learning-rate schedule gave a rate that is not finite or is negative.
    """
    t = clock.iterations + 1
    decay, beta_1 = config.schedule_decay, config.beta_1
    mu = beta_1 * (1.0 - 0.5 * power_of_step(0.96, decay, t))
    mu_next = beta_1 * (1.0 - 0.5 * power_of_step(0.96, decay, t + 1))
    m_schedule = clock.m_schedule * mu
    lr = rate_at(config.lr, clock.iterations) if callable(config.lr) else config.lr
    c_g = lr * (1.0 - mu) / (1.0 - m_schedule)
    c_m = lr * mu_next / (1.0 - m_schedule * mu_next)
    correction = math.sqrt(1.0 - power_of_step(config.beta_2, 1.0, t))
    return StepScalars(
        lr=lr,
        coefficients=(
            c_g * correction,
            c_m * correction,
            config.epsilon * correction,
            1.0 - beta_1,
            1.0 - config.beta_2,
        ),
        after=Clock(t, m_schedule),
    )


def prepare(clock: Clock, config: NadamConfig) -> None:
    """Compute the powers that the step after `clock` needs, so that the step itself finds them
    kept.
    """
    power_of_step(0.96, config.schedule_decay, clock.iterations + 2)
    power_of_step(config.beta_2, 1.0, clock.iterations + 1)
