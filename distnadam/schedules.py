"""Learning-rate schedules: functions of the number of steps applied, 0 before the first.

Each is a frozen dataclass, so it compares, pickles, and goes to and from a plain dict. A frozen
dataclass of the user's that subclasses `Schedule` is registered for checkpoints. Powers and cosines
have the same bits on every host (`reproducible_math`).

    >>> from distnadam.schedules import WarmupCosine
    >>> WarmupCosine(peak=0.1, warmup_steps=10, total_steps=100)(9)
    0.1
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distnadam.errors import ConfigError
from distnadam.reproducible_math import cosine_of_pi_times, power

Rate = float | Callable[[int], float]
"""A learning rate: a number, or a function of the number of steps applied."""


class Schedule(ABC):
    """A learning rate as a function of the step; a checkpoint stores its class name and fields.

    Subclasses are frozen dataclasses; each has a name of its own.
    """

    _registry: ClassVar[dict[str, type["Schedule"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (
            cls.__name__ in Schedule._registry
            and Schedule._registry[cls.__name__].__module__ != cls.__module__
        ):
            raise ConfigError(
                f"a Schedule named {cls.__name__!r} is defined in "
                f"{Schedule._registry[cls.__name__].__module__}: rename it"
            )
        Schedule._registry[cls.__name__] = cls

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at every step.

    Args:
        rate: the learning rate.
    """

    rate: float

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step."""
        return self.rate


@dataclass(frozen=True)
class Exponential(Schedule):
    """``initial * decay_rate ** (step / decay_steps)``, as Keras's ExponentialDecay.

    Args:
        initial: the rate of the first step.
        decay_steps: steps in which the rate is multiplied by `decay_rate`.
        decay_rate: the factor.
        staircase: round the exponent down.
    """

    initial: float
    decay_steps: int
    decay_rate: float
    staircase: bool = False

    def __post_init__(self) -> None:
        _require(self.decay_steps >= 1, self, "decay_steps", self.decay_steps, "at least 1")
        _require(self.decay_rate >= 0, self, "decay_rate", self.decay_rate, "at least 0")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        exponent = step // self.decay_steps if self.staircase else step / self.decay_steps
        return self.initial * power(float(self.decay_rate), float(exponent))


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A linear rise to `peak`, then half a cosine down to `final`, which stays.

    Args:
        peak: the largest rate.
        warmup_steps: steps of the rise.
        total_steps: the step at which `final` is reached.
        final: the last rate.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, self, "warmup_steps", self.warmup_steps, "at least 0")
        _require(
            self.total_steps > self.warmup_steps,
            self,
            "total_steps",
            self.total_steps,
            "more than warmup_steps",
        )

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        fraction = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + cosine_of_pi_times(fraction))


@dataclass(frozen=True)
class Piecewise(Schedule):
    """`rates[i]` up to and including step `boundaries[i]`, as Keras's PiecewiseConstantDecay.

    Args:
        boundaries: increasing steps.
        rates: one more than there are boundaries; the last one stays.
    """

    boundaries: tuple[int, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "rates", tuple(self.rates))
        _require(
            len(self.rates) == len(self.boundaries) + 1,
            self,
            "rates",
            self.rates,
            "one longer than boundaries",
        )
        _require(
            list(self.boundaries) == sorted(set(self.boundaries)),
            self,
            "boundaries",
            self.boundaries,
            "increasing",
        )

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        passed = sum(step > boundary for boundary in self.boundaries)
        return self.rates[passed]


def _require(ok: bool, schedule: Schedule, field: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{type(schedule).__name__}: {field} must be {expected}, got {value!r}")


def rate_at(rate: Rate, step: int) -> float:
    """Return the learning rate after `step` applied steps.

    Raises:
        ConfigError: the schedule raised, or its rate is not finite and at least 0.
    """
    try:
        value = float(rate(step)) if callable(rate) else rate
    except Exception as error:
        raise ConfigError(
            f"lr at step {step}: the schedule raised {type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(value) or value < 0.0:
        raise ConfigError(f"lr at step {step} must be finite and at least 0, got {value!r}")
    return value


def rate_to_dict(rate: Rate) -> float | dict[str, Any]:
    """Return a rate as plain data; raise ConfigError for a function that is no `Schedule`."""
    if not callable(rate):
        return rate
    if not isinstance(rate, Schedule):
        raise ConfigError(
            f"lr={rate!r} is a plain function, which a checkpoint cannot store: use "
            "distnadam.schedules, or subclass distnadam.schedules.Schedule with a frozen dataclass "
            "of your own"
        )
    if not dataclasses.is_dataclass(rate):
        raise ConfigError(
            f"lr={rate!r}: a Schedule must be a frozen dataclass, so that its fields can be stored"
        )
    fields = {f.name: getattr(rate, f.name) for f in dataclasses.fields(rate)}
    plain = {
        k: [_plain(x) for x in v] if isinstance(v, tuple) else _plain(v) for k, v in fields.items()
    }
    return {"class_name": type(rate).__name__, "config": plain}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def rate_from(value: Any) -> Rate:
    """Return the rate of `rate_to_dict`'s plain data; numbers and functions pass through."""
    if not isinstance(value, Mapping):
        return value  # type: ignore[no-any-return]  # validated by NadamConfig
    name, fields = value.get("class_name"), value.get("config")
    cls = Schedule._registry.get(name) if isinstance(name, str) else None
    if cls is None or not isinstance(fields, Mapping):
        known = ", ".join(sorted(Schedule._registry))
        raise ConfigError(
            f"lr: unknown schedule {name!r}; known are {known}. A schedule of your own must be "
            "imported first"
        )
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"lr: schedule {name} does not take {dict(fields)!r}: {error}") from error
