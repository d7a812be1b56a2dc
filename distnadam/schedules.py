"""Learning-rate schedules: functions of the number of steps applied, 0 before the first.

Each is a frozen dataclass, so it compares, pickles, and goes to and from a plain dict; so does a
frozen dataclass of the user's that subclasses `Schedule`, whose fields may be schedules in turn.
Powers and cosines have the same bits on every host (`reproducible_math`).

    >>> from distnadam.schedules import WarmupCosine
    >>> WarmupCosine(peak=0.1, warmup_steps=10, total_steps=100)(9)
    0.1
"""

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distnadam.errors import ConfigError
from distnadam.plain_data import PlainData
from distnadam.reproducible_math import cosine_of_pi_times, power

Rate = float | Callable[[int], float]
"""A learning rate: a number, or a function of the number of steps applied."""


_WITHOUT_BODY = frozenset(
    {"__module__", "__doc__", "__slots__", "__dict__", "__abstractmethods__", "_abc_impl"}
)


def _has_body(cls: type) -> bool:
    """Whether a class has anything of its own, or has been filled in since it was made."""
    return bool(vars(cls).keys() - _WITHOUT_BODY - set(vars(cls).get("__slots__", ())))


class Schedule(ABC):
    """A learning rate as a function of the step; a checkpoint stores its class name and fields.

    Subclasses are frozen dataclasses; each has a name of its own. Fields hold what a checkpoint's
    `data` does, and other schedules, also in tuples, lists and dicts. Two schedules are equal if
    their classes' names and their fields are, arrays bit by bit.
    """

    _defined: ClassVar[dict[str, type["Schedule"]]] = {}
    """The classes that class statements made, by name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not _has_body(cls):
            return  # cloudpickle makes a class without a body whenever it unpickles one by value
        defined = Schedule._defined.get(cls.__name__, cls)
        if defined.__module__ != cls.__module__:
            raise ConfigError(
                f"a Schedule named {cls.__name__!r} is defined in {defined.__module__}: rename it"
            )
        Schedule._defined[cls.__name__] = cls
        if "__eq__" not in vars(cls):
            cls.__eq__ = Schedule.__eq__  # type: ignore[method-assign]  # the dataclass makes none

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        if type(self).__name__ != type(other).__name__ or not dataclasses.is_dataclass(self):
            return self is other
        return _same(_fields(self), _fields(other))

    def __hash__(self) -> int:
        return hash(type(self).__name__)

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
    """Return a rate as plain data, which JSON can say too.

    Raises:
        ConfigError: the rate is a function that is no `Schedule`, or a field cannot be stored.
    """
    if not callable(rate):
        return rate
    if not isinstance(rate, Schedule):
        raise ConfigError(
            f"lr={rate!r} is a plain function, which a checkpoint cannot store: use "
            "distnadam.schedules, or subclass distnadam.schedules.Schedule with a frozen dataclass "
            "of your own"
        )
    packed: dict[str, Any] = _pack_schedule(rate, "lr", 0)
    return packed


def rate_from(value: Any) -> Rate:
    """Return the rate of `rate_to_dict`'s plain data; numbers and functions pass through.

    Raises:
        ConfigError: the schedule's class is not defined in this process, or refuses its fields.
    """
    if not isinstance(value, Mapping):
        return value  # type: ignore[no-any-return]  # validated by NadamConfig
    return _unpack_schedule(value)


def kept(rate: Rate) -> Rate:
    """Return a rate that nobody else changes; raise ConfigError for a class, and for a `Schedule`
    that cannot be stored.
    """
    if isinstance(rate, type):
        raise ConfigError(
            f"lr is the class {rate.__name__}: give an instance, {rate.__name__}(...)"
        )
    if not isinstance(rate, Schedule):
        return rate
    rate_to_dict(rate)
    return copy.deepcopy(rate)


def _pack_schedule(value: Any, where: str, level: int) -> Any:
    if not isinstance(value, Schedule):
        return PlainData().pack_other(value, where, level)
    kind = type(value)
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise ConfigError(
            f"{where}={value!r}: a Schedule must be a frozen dataclass, so that its fields can be "
            "stored"
        )
    given = _fields(value)
    packed = {
        name: _PLAIN.pack(field, f"{where}: {kind.__name__}.{name}", level + 1)
        for name, field in given.items()
    }
    try:
        again = kind(**given)
    except Exception as error:
        raise ConfigError(
            f"{where}={value!r}: cannot be made again of its fields {', '.join(given)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if again != value:
        raise ConfigError(f"{where}={value!r}: made again of its fields, it is {again!r}")
    return {"class_name": kind.__name__, "config": packed}


def _unpack_schedule(packed: Mapping[str, Any]) -> Schedule:
    name, config = packed.get("class_name"), packed.get("config")
    kind = _class_named(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(sorted({c.__name__ for c in _subclasses(Schedule)}))
        raise ConfigError(
            f"lr: unknown schedule {name!r}; known are {known}. A schedule of your own must be "
            "imported first"
        )
    if not isinstance(config, Mapping):
        raise ConfigError(f"lr: config of schedule {name} must be a mapping, got {config!r}")
    fields = {key: _PLAIN.unpack(value) for key, value in config.items()}
    try:
        return kind(**fields)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"lr: schedule {name} does not take {fields!r}: {error}") from error


_PLAIN = PlainData(
    bare=tuple,
    pack_other=_pack_schedule,
    reserved=(frozenset({"class_name", "config"}),),
    unpack_reserved=_unpack_schedule,
)


def _fields(schedule: Any) -> dict[str, Any]:
    """Return what a schedule is made of; fields that it computes itself are left out."""
    return {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule) if f.init}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return (
            type(one) is type(other)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, type(one)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)


def _class_named(name: str) -> type[Schedule] | None:
    """Return the schedule of that name: of a class statement, else one that was unpickled."""
    if name in Schedule._defined:
        return Schedule._defined[name]
    found = [cls for cls in _subclasses(Schedule) if cls.__name__ == name]
    filled = [cls for cls in found if _has_body(cls)]
    return filled[-1] if filled else next(iter(found), None)


def _subclasses(cls: type) -> Iterator[type[Schedule]]:
    subclasses: Sequence[type[Schedule]] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)
