"""What a schedule is: its base class, when two are equal, and the rate of a step."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from distnadam.checks import check_as, check_count
from distnadam.errors import ConfigError

Rate = float | Callable[[int], float]
"""A learning rate: a number, or a function of the number of steps applied."""


_WITHOUT_BODY = frozenset(
    {"__module__", "__doc__", "__slots__", "__dict__", "__abstractmethods__", "_abc_impl"}
)


def has_body(cls: type) -> bool:
    """Whether a class has anything of its own, or has been filled in since it was made."""
    return bool(vars(cls).keys() - _WITHOUT_BODY - set(vars(cls).get("__slots__", ())))


class Schedule(ABC):
    """A learning rate as a function of the step; a checkpoint stores its class name and fields.

    Subclasses are frozen dataclasses; each has a name of its own. Fields hold what a checkpoint's
    `data` does, and other schedules, also in tuples, lists and dicts. Two schedules are equal if
    their classes' names and their fields are, arrays bit by bit.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Stairs(Schedule):
    ...     initial: float
    ...     every: int
    ...     def __call__(self, step):
    ...         return self.initial * 0.5 ** (step // self.every)
    >>> DistNadam(lr=Stairs(0.1, every=10)).lr(10)
    0.05
    """

    _defined: ClassVar[dict[str, type["Schedule"]]] = {}
    """The classes that class statements made, by name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not has_body(cls):
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
        return _same(fields_of(self), fields_of(other))

    def __hash__(self) -> int:
        return hash(type(self).__name__)

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""


def rate_at(rate: Rate, step: int) -> float:
    """Return the learning rate after `step` applied steps.

    Raises:
        ConfigError: the schedule raised, or its rate is not finite and at least 0.

    >>> rate_at(0.1, 5), rate_at(lambda step: 1 / (step + 1), 3)
    (0.1, 0.25)
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


def fields_of(schedule: Any) -> dict[str, Any]:
    """Return what a schedule is made of; fields that it computes itself are left out."""
    return {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule) if f.init}


def require(ok: bool, schedule: Schedule, field: str, value: object, expected: str) -> None:
    """Raise ConfigError, naming the schedule, its field and what was expected, unless `ok`."""
    if not ok:
        raise ConfigError(f"{type(schedule).__name__}: {field} must be {expected}, got {value!r}")


def set_count(schedule: Schedule, field: str, *, least: int = 1) -> None:
    """Check that a field is a whole number of at least `least`, and store it as an int."""
    name = f"{type(schedule).__name__}: {field}"
    object.__setattr__(schedule, field, check_count(name, getattr(schedule, field), least=least))


def set_real(schedule: Schedule, field: str, *, is_positive: bool = False) -> None:
    """Check that a field is a finite number of at least 0, or above it, and store it as a float."""
    name = f"{type(schedule).__name__}: {field}"
    number = check_as(float, name, getattr(schedule, field))
    require(number > 0.0 or not is_positive, schedule, field, number, "above 0")
    object.__setattr__(schedule, field, number)


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
