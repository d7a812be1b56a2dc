"""The scalars of one step, in float64, from the step's number: momentum, bias corrections, decay.

Pure functions of two numbers of the whole optimizer, `iterations` and `m_schedule`; every shard
computes the same bits (`exact`).
"""

import math
from dataclasses import dataclass

from distnadam.hyperparameters import NadamConfig
from distnadam.reproducible_math import power_of_step
from distnadam.schedules import rate_at

NONE = math.nan
"""The coefficient of a term that a step does not have: not computed, since 0 * inf is no 0."""


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
        coefficients: of the gradient (or `NONE`), of the momentum, epsilon, the weights of the
            gradient in the first and of its square in the second moment, the part of the old
            parameters that is taken from them (or `NONE`), and their weight in the gradient (or
            `NONE`).
        after: the clock after the step.

    The second moment's correction ``r = 1 / sqrt(1 - beta_2**t)`` is folded into the first three
    coefficients, which are c_g / r, c_m / r and epsilon / r, so that a kernel computes ``p -=
    decay*p + (gradient*g + momentum*m) / (sqrt(v) + epsilon)`` with one multiplication less per
    element. What decays is subtracted: a factor of 1 - decay would be rounded to float32 alike at
    every step, and err by 6e-6 after 200.
    """

    lr: float
    coefficients: tuple[float, float, float, float, float, float, float]
    after: Clock


def step_scalars(clock: Clock, config: NadamConfig) -> StepScalars:
    """Return the scalars of the step that follows `clock`.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (2016), with the schedule of
    tf.keras.optimizers.Nadam (TensorFlow 1.13); Kingma and Ba, "Adam" (2014); Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization" (2017). `NadamConfig.formula` says which.

    Raises:
        ConfigError: the learning-rate schedule gave a rate that is not finite or is negative.
    """
    t, beta_1 = clock.iterations + 1, config.beta_1
    lr = rate_at(config.lr, clock.iterations) if callable(config.lr) else config.lr
    if config.has_momentum_schedule:
        decay = config.schedule_decay
        mu = beta_1 * (1.0 - 0.5 * power_of_step(0.96, decay, t))
        mu_next = beta_1 * (1.0 - 0.5 * power_of_step(0.96, decay, t + 1))
        product = clock.m_schedule * mu
        c_g = lr * (1.0 - mu) / (1.0 - product)
        c_m = lr * mu_next / (1.0 - product * mu_next)
    else:
        product = power_of_step(beta_1, 1.0, t)
        c_g, c_m = _constant_momentum(lr, product, t, config)
    correction = math.sqrt(1.0 - power_of_step(config.beta_2, 1.0, t))
    weight_decay, is_decoupled = config.weight_decay, config.decoupled_weight_decay
    return StepScalars(
        lr=lr,
        coefficients=(
            c_g * correction,
            c_m * correction,
            config.epsilon if config.formula == "adam_keras" else config.epsilon * correction,
            1.0 - beta_1,
            1.0 - config.beta_2,
            lr * weight_decay if weight_decay and is_decoupled else NONE,
            weight_decay if weight_decay and not is_decoupled else NONE,
        ),
        after=Clock(t, product),
    )


def _constant_momentum(
    lr: float, product: float, t: int, config: NadamConfig
) -> tuple[float, float]:
    """Return c_g and c_m where the momentum coefficient is beta_1 at every step, and their product
    beta_1**t.
    """
    beta_1 = config.beta_1
    if config.formula in ("adam", "adam_keras"):
        return NONE, lr / (1.0 - product)
    ahead = power_of_step(beta_1, 1.0, t + 1) if config.formula == "nadam_optax" else product
    return lr * (1.0 - beta_1) / (1.0 - product), lr * beta_1 / (1.0 - ahead)


def prepare(clock: Clock, config: NadamConfig) -> None:
    """Compute the powers that the step after `clock` needs, so that the step itself finds them
    kept.
    """
    if config.has_momentum_schedule:
        power_of_step(0.96, config.schedule_decay, clock.iterations + 2)
    else:
        power_of_step(config.beta_1, 1.0, clock.iterations + 1)
    power_of_step(config.beta_2, 1.0, clock.iterations + 1)
