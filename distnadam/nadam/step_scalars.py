"""The scalars of one step, in float64, from the step's number: momentum, bias corrections, decay.

Pure functions of two numbers of the whole optimizer, `iterations` and `m_schedule`; every shard
computes the same bits (`exact`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distnadam.errors import ConfigError
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.averaging import Averaging, averaging_of
from distnadam.nadam.step_overrides import NOT_SET, unpacked_overrides
from distnadam.reproducible_math import power_of_step
from distnadam.schedules import rate_at

NONE = math.nan
"""The coefficient of a term that a step does not have: not computed, since 0 * inf is no 0."""
PER_SETTING = 8
"""Coefficients of each setting."""


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
        lr: the learning rate, of tensors that are in no group.
        coefficients: `PER_SETTING` for tensors in no group, then as many for each group: of the
            gradient (or `NONE`), of the momentum, epsilon, the weights of the gradient in the first
            and of its square in the second moment, the part of the old parameters that is taken
            from them (or `NONE`), their weight in the gradient (or `NONE`), and the largest
            magnitude of an element of the mean gradient (or `NONE`).
        after: the clock after the step.
        averaging: what becomes of the average of the parameters; None if none is kept.

    The second moment's correction ``r = 1 / sqrt(1 - beta_2**t)`` is folded into the first three
    coefficients, which are c_g / r, c_m / r and epsilon / r, so that a kernel computes ``p -=
    decay*p + (gradient*g + momentum*m) / (sqrt(v) + epsilon)`` with one multiplication less per
    element. What decays is subtracted: a factor of 1 - decay would be rounded to float32 alike at
    every step, and err by 6e-6 after 200.
    """

    lr: float
    coefficients: tuple[float, ...]
    after: Clock
    averaging: Averaging | None = None


def step_scalars(clock: Clock, config: NadamConfig, overrides: bytes = b"") -> StepScalars:
    """Return the scalars of the step that follows `clock`, with the learning rates and betas that
    are of this step alone (`step_overrides`).

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (2016), with the schedule of
    tf.keras.optimizers.Nadam (TensorFlow 1.13); Kingma and Ba, "Adam" (2014); Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization" (2017). `NadamConfig.formula` says which.

    Raises:
        ConfigError: the learning-rate schedule gave a rate that is not finite or is negative.
    """
    t = clock.iterations + 1
    given = unpacked_overrides(overrides) if overrides else [NOT_SET]
    lr, beta_1, beta_2 = given[0]
    if math.isnan(lr):
        lr = rate_at(config.lr, clock.iterations) if callable(config.lr) else config.lr
    beta_1 = config.beta_1 if math.isnan(beta_1) else beta_1
    beta_2 = config.beta_2 if math.isnan(beta_2) else beta_2
    formula = config.formula
    is_adam = formula in ("adam", "adam_keras")
    if formula == "nadam":
        mu = beta_1 * (1.0 - 0.5 * power_of_step(0.96, config.schedule_decay, t))
        mu_next = beta_1 * (1.0 - 0.5 * power_of_step(0.96, config.schedule_decay, t + 1))
        product = clock.m_schedule * mu
        ahead = product * mu_next
    else:
        mu = mu_next = beta_1
        product = power_of_step(beta_1, 1.0, t)
        ahead = power_of_step(beta_1, 1.0, t + 1) if formula == "nadam_optax" else product
    correction = math.sqrt(1.0 - power_of_step(beta_2, 1.0, t))
    numbers: list[float] = []
    settings: Iterable[tuple[float, NadamConfig]] = ((lr, config),)
    if config.groups:
        settings = each_setting(lr, clock, config, [each[0] for each in given[1:]])
    for rate, setting in settings:
        decay, limit = setting.weight_decay, setting.clipvalue
        numbers += (
            NONE if is_adam else rate * (1.0 - mu) / (1.0 - product) * correction,
            (rate if is_adam else rate * mu_next) / (1.0 - ahead) * correction,
            setting.epsilon * (1.0 if formula == "adam_keras" else correction),
            1.0 - beta_1,
            1.0 - beta_2,
            rate * decay if decay and config.decoupled_weight_decay else NONE,
            decay if decay and not config.decoupled_weight_decay else NONE,
            NONE if limit is None else limit,
        )
    return StepScalars(
        lr=lr,
        coefficients=tuple(numbers),
        after=Clock(t, product),
        averaging=averaging_of(config, t) if config.use_ema else None,
    )


def each_setting(
    lr: float, clock: Clock, config: NadamConfig, own_rates: Sequence[float] = ()
) -> Iterator[tuple[float, NadamConfig]]:
    """Yield the rate and the settings of tensors in no group, then of each group's; `own_rates` are
    those of the first groups for this step alone, NaN where there is none.

    Raises:
        ConfigError: naming the group whose rate is not finite or is negative.
    """
    yield lr, config
    for number, (group, settings) in enumerate(
        zip(config.groups, config.group_settings, strict=True)
    ):
        if number < len(own_rates) and not math.isnan(own_rates[number]):
            yield own_rates[number], settings
            continue
        own = lr * group.lr_scale if group.lr is None else group.lr
        try:
            yield rate_at(own, clock.iterations), settings
        except ConfigError as error:
            raise ConfigError(f"group {group.pattern!r}: {error}") from error


def prepare(clock: Clock, config: NadamConfig) -> None:
    """Compute the powers that the step after `clock` needs, so that the step itself finds them
    kept.
    """
    if config.formula == "nadam":
        power_of_step(0.96, config.schedule_decay, clock.iterations + 2)
    else:
        power_of_step(config.beta_1, 1.0, clock.iterations + 1)
    power_of_step(config.beta_2, 1.0, clock.iterations + 1)
