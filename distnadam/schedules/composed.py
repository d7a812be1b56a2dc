"""Schedules that are made of others."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distnadam.checks import check_as, check_count
from distnadam.errors import ConfigError
from distnadam.schedules.base import Schedule, require, set_count, set_real


@dataclass(frozen=True)
class Warmup(Schedule):
    """A linear rise to the first rate of another schedule, which then counts from its own 0.

    Without `initial` the rise is that of `WarmupCosine`: its steps have 1, 2, ... times the rate
    ``schedule(0) / steps``. With it, it is optax's linear_schedule before a boundary, and torch's
    LinearLR in a SequentialLR with ``start_factor=initial / schedule(0)``.

    Args:
        schedule: what follows, a schedule or a rate that stays.
        steps: steps of the rise, at least 0.
        initial: the rate of the first step; None means ``schedule(0) / steps``.

    Raises:
        ConfigError: a field is out of its range, or `schedule` is a plain function, which no
            checkpoint can hold.

    >>> schedule = Warmup(Polynomial(initial=1.0, total_steps=4), steps=4)
    >>> [schedule(step) for step in range(7)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5]
    >>> Warmup(0.1, steps=2, initial=0.0)(1)
    0.05
    """

    schedule: float | Schedule
    steps: int
    initial: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", _part(self, "schedule", self.schedule))
        set_count(self, "steps", least=0)
        if self.initial is not None:
            set_real(self, "initial")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        if step >= self.steps:
            return _rate(self.schedule, step - self.steps)
        top = _rate(self.schedule, 0)
        if self.initial is None:
            return top * (step + 1) / self.steps
        return self.initial + (top - self.initial) * (step / self.steps)


@dataclass(frozen=True)
class Sequential(Schedule):
    """One schedule after the other, each counted from its own 0, as optax's join_schedules.

    The step ``boundaries[i]`` is the first of ``schedules[i + 1]``, as in optax and in torch's
    SequentialLR. (`Piecewise` has that step the last of the rate before, as in Keras.)

    Args:
        schedules: at least one schedule, or rate that stays.
        boundaries: increasing steps, at least 1, one fewer than there are schedules.

    Raises:
        ConfigError: a field is out of its range, or one of `schedules` is a plain function, which
            no checkpoint can hold.

    >>> schedule = Sequential((1.0, Exponential(0.5, decay_steps=1, decay_rate=0.5)), (2,))
    >>> [schedule(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.25, 0.125]
    """

    schedules: tuple[float | Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        schedules = [
            _part(self, f"schedules[{i}]", part)
            for i, part in enumerate(_several(self, "schedules", self.schedules))
        ]
        boundaries = [
            check_count(f"{type(self).__name__}: boundaries[{i}]", step)
            for i, step in enumerate(_several(self, "boundaries", self.boundaries))
        ]
        object.__setattr__(self, "schedules", tuple(schedules))
        object.__setattr__(self, "boundaries", tuple(boundaries))
        is_fitting = len(schedules) == len(boundaries) + 1
        require(is_fitting, self, "boundaries", self.boundaries, "one fewer than schedules")
        is_increasing = boundaries == sorted(set(boundaries))
        require(is_increasing, self, "boundaries", self.boundaries, "increasing")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the next step, after `step` applied steps."""
        passed = sum(step >= boundary for boundary in self.boundaries)
        begin = self.boundaries[passed - 1] if passed else 0
        return _rate(self.schedules[passed], step - begin)


def _part(owner: Schedule, field: str, part: Any) -> float | Schedule:
    """Return a schedule, or a number as a float; raise ConfigError for anything else."""
    if isinstance(part, Schedule):
        return part
    name = f"{type(owner).__name__}: {field}"
    if callable(part):
        hint = f": give an instance, {part.__name__}(...)" if isinstance(part, type) else ""
        raise ConfigError(f"{name} must be a number or a Schedule, got {part!r}{hint}")
    number: float = check_as(float, name, part)
    return number


def _several(owner: Schedule, field: str, given: Any) -> Iterable[Any]:
    require(isinstance(given, (tuple, list)), owner, field, given, "a tuple")
    several: Iterable[Any] = given
    return several


def _rate(part: float | Schedule, step: int) -> float:
    return part(step) if isinstance(part, Schedule) else part
