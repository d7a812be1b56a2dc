"""The scalars of one step, in float64, from the step's number: momentum, bias corrections, decay.

Pure functions of two numbers of the whole optimizer, `iterations` and `m_schedule`, or of the same
two of each tensor; every shard computes the same bits (`reproducible_math`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class TensorClock(NamedTuple):
    """How far one tensor is: its steps, and the product of its momentum coefficients so far."""

    steps: int = 0
    product: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorClocks:
    """How far each tensor of a model is.

    Attributes:
        table: the distinct clocks, in the order of the first tensor that has each.
        index: each tensor's place in the table.
    """

    table: tuple[TensorClock, ...]
    index: tuple[int, ...]

    @classmethod
    def of(cls, clocks: Iterable[TensorClock]) -> "TensorClocks":
        """Return the clocks of tensors in order."""
        places: dict[TensorClock, int] = {}
        index = tuple([places.setdefault(clock, len(places)) for clock in clocks])
        return cls(tuple(places), index)

    def of_tensor(self, tensor: int) -> TensorClock:
        """Return one tensor's."""
        return self.table[self.index[tensor]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `from_dict`."""
        return {"table": [list(clock) for clock in self.table], "index": list(self.index)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TensorClocks":
        """Return the clocks of `to_dict`'s plain data; raise ValueError for what is none."""
        if data.keys() != {"table", "index"}:
            raise ValueError(f"expected a table and an index, got {', '.join(map(str, data))}")
        for steps, product in data["table"]:
            if type(steps) is not int or not 0 <= steps < 1 << 63 or type(product) is not float:
                raise ValueError(f"a clock is {steps!r:.50}, {product!r:.50}")
            if not 0.0 <= product <= 1.0:
                raise ValueError(f"a product of momentum coefficients is {product!r}")
        table = tuple(TensorClock(steps, product) for steps, product in data["table"])
        clocks = cls(table, tuple(data["index"]))
        if not all(type(place) is int and 0 <= place < len(table) for place in clocks.index):
            raise ValueError(f"an index is no list of places in a table of {len(table)}")
        if clocks != cls.of(map(table.__getitem__, clocks.index)):
            raise ValueError("its index and its table contradict each other")
        return clocks


@dataclass(slots=True)  # not frozen, which costs a microsecond a step
class Clock:
    """How far the optimizer is.

    Attributes:
        iterations: steps applied.
        m_schedule: the product of its momentum coefficients so far (1 before the first step).
        tensors: how far each tensor is; None if all are where the optimizer is.
    """

    iterations: int = 0
    m_schedule: float = 1.0
    tensors: TensorClocks | None = None

    @property
    def table(self) -> tuple[TensorClock, ...]:
        """The distinct clocks of the tensors."""
        if self.tensors is None:
            return (TensorClock(self.iterations, self.m_schedule),)
        return self.tensors.table

    def of_tensor(self, tensor: int) -> TensorClock:
        """Return one tensor's."""
        return self.table[0] if self.tensors is None else self.tensors.of_tensor(tensor)


class Stepping(Protocol):
    """Which tensors a round steps, and by what."""

    @property
    def columns(self) -> Sequence[tuple[int, int]]:
        """Of each set of coefficients, the index of the settings and of the clock in its table."""

    def after(self, clock: Clock, columns: Sequence[TensorClock]) -> TensorClocks | None:
        """Return the tensors' clocks after the step, if they are told apart.

        Args:
            clock: before it.
            columns: after it, of the tensors that are stepped by each set of coefficients.
        """


@dataclass(slots=True, kw_only=True)  # not frozen, which costs a microsecond a step
class StepScalars:
    """What one step needs beside the arrays.

    Attributes:
        lr: the learning rate, of tensors that are in no group.
        coefficients: `PER_SETTING` for tensors in no group, then as many for each group, or for
            each of `Stepping.columns`: of the
            gradient (or `NONE`), of the momentum, epsilon, the weights of the gradient in the first
            and of its square in the second moment, the part of the old parameters that is taken
            from them (or `NONE`), their weight in the gradient (or `NONE`), and the largest
            magnitude of an element of the mean gradient (or `NONE`).
        after: the clock after the step.
        averaging: what becomes of the average of the parameters, for each set of coefficients;
            empty if none is kept.

    The second moment's correction ``r = 1 / sqrt(1 - beta_2**t)`` is folded into the first three
    coefficients, which are c_g / r, c_m / r and epsilon / r, so that a kernel computes ``p -=
    decay*p + (gradient*g + momentum*m) / (sqrt(v) + epsilon)`` with one multiplication less per
    element. What decays is subtracted: a factor of 1 - decay would be rounded to float32 alike at
    every step, and err by 6e-6 after 200.
    """

    lr: float
    coefficients: tuple[float, ...]
    after: Clock
    averaging: tuple[Averaging, ...] = ()


def step_scalars(
    clock: Clock,
    config: NadamConfig,
    overrides: bytes = b"",
    stepping: Stepping | None = None,
) -> StepScalars:
    """Return the scalars of the step that follows `clock`.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (2016), with the schedule of
    tf.keras.optimizers.Nadam (TensorFlow 1.13); Kingma and Ba, "Adam" (2014); Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization" (2017). `NadamConfig.formula` says which.

    Args:
        clock: before the step.
        config: the hyper-parameters.
        overrides: the learning rates and betas that are of this step alone (`step_overrides`).
        stepping: which tensors it steps; None for all, where none has a clock of its own.

    Raises:
        ConfigError: the learning-rate schedule gave a rate that is not finite or is negative.
    """
    given = unpacked_overrides(overrides) if overrides else [NOT_SET]
    lr, beta_1, beta_2 = given[0]
    if math.isnan(lr):
        lr = rate_at(config.lr, clock.iterations) if callable(config.lr) else config.lr
    beta_1 = config.beta_1 if math.isnan(beta_1) else beta_1
    beta_2 = config.beta_2 if math.isnan(beta_2) else beta_2
    formula = config.formula
    is_adam = formula in ("adam", "adam_keras")
    numbers: list[float] = []
    products: list[float] = []
    columns: Sequence[_Column] = ((lr, config, beta_1, beta_2, clock.iterations, clock.m_schedule),)
    if stepping is not None or config.groups:
        columns = [*columns, *_columns(columns[0], clock, given[1:], stepping)]
    for rate, setting, beta_1, beta_2, steps, so_far in columns:
        t = steps + 1
        if formula == "nadam":
            mu = beta_1 * (1.0 - 0.5 * power_of_step(0.96, config.schedule_decay, t))
            mu_next = beta_1 * (1.0 - 0.5 * power_of_step(0.96, config.schedule_decay, t + 1))
            product = so_far * mu
            ahead = product * mu_next
        else:
            mu = mu_next = beta_1
            product = power_of_step(beta_1, 1.0, t)
            ahead = power_of_step(beta_1, 1.0, t + 1) if formula == "nadam_optax" else product
        correction = math.sqrt(1.0 - power_of_step(beta_2, 1.0, t))
        decay, limit = setting.weight_decay, setting.clipvalue
        products.append(product)
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
    own, tensors, t = products[0], None, clock.iterations + 1
    if len(columns) > 1:  # the first is the optimizer's own, and no tensor's
        numbers, columns = numbers[PER_SETTING:], columns[1:]
    if stepping is not None:
        after = zip(columns, products[1:], strict=True)
        tensors = stepping.after(clock, [TensorClock(c[4] + 1, product) for c, product in after])
    return StepScalars(
        lr=lr,
        coefficients=tuple(numbers),
        after=Clock(t, own, tensors),
        averaging=tuple([averaging_of(config, c[4] + 1, t) for c in columns])
        if config.use_ema
        else (),
    )


_Column = tuple[float, NadamConfig, float, float, int, float]
"""What one set of coefficients is made of: the rate, the settings, both betas, the steps of its
tensors, and the product of their momentum coefficients so far.
"""


def _columns(
    own: _Column, clock: Clock, given: Sequence[Sequence[float]], stepping: Stepping | None
) -> Iterator[_Column]:
    """Yield those of a step whose tensors differ in their settings or clocks.

    Args:
        own: the optimizer's.
        clock: before the step.
        given: of the first groups, the rate and betas of this step alone, NaN where there are none.
        stepping: which tensors it steps.
    """
    lr, config, beta_1, beta_2, *_ = own
    settings = list(each_setting(lr, clock, config, [rate for rate, *_ in given]))
    found = [(*settings[0], beta_1, beta_2)]
    for number, (group, setting) in enumerate(zip(config.groups, settings[1:], strict=True)):
        alone = given[number] if number < len(given) else NOT_SET
        own_1 = beta_1 if group.beta_1 is None else group.beta_1
        own_2 = beta_2 if group.beta_2 is None else group.beta_2
        own_1 = own_1 if math.isnan(alone[1]) else alone[1]
        own_2 = own_2 if math.isnan(alone[2]) else alone[2]
        found.append((*setting, own_1, own_2))
    if stepping is None:
        yield from ((*each, clock.iterations, clock.m_schedule) for each in found)
    else:
        table = clock.table
        yield from ((*found[index], *table[place]) for index, place in stepping.columns)


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
    kept; those of the optimizer, which most tensors have.
    """
    steps = clock.iterations
    if config.formula == "nadam":
        power_of_step(0.96, config.schedule_decay, steps + 2)
    else:
        power_of_step(config.beta_1, 1.0, steps + 1)
    power_of_step(config.beta_2, 1.0, steps + 1)
