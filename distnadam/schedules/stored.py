"""How a schedule is stored: as plain data of its class's name and its fields, and back."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distnadam.errors import ConfigError
from distnadam.plain_data import PlainData
from distnadam.schedules.base import Rate, Schedule, fields_of, has_body


def rate_to_dict(rate: Rate) -> float | dict[str, Any]:
    """Return a rate as plain data, which JSON can say too.

    Raises:
        ConfigError: the rate is a function that is no `Schedule`, or a field cannot be stored.

    >>> rate_to_dict(Constant(0.1))
    {'class_name': 'Constant', 'config': {'rate': 0.1}}
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

    >>> rate_from({"class_name": "Constant", "config": {"rate": 0.1}})
    Constant(rate=0.1)
    """
    if not isinstance(value, Mapping):
        return value  # type: ignore[no-any-return]  # validated by NadamConfig
    return _unpack_schedule(value)


def kept(rate: Rate) -> Rate:
    """Return a rate that nobody else changes; raise ConfigError for a class, and for a `Schedule`
    that cannot be stored.

    >>> kept(Constant(0.1)) == Constant(0.1), kept(0.1)
    (True, 0.1)
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
    given = fields_of(value)
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


def _class_named(name: str) -> type[Schedule] | None:
    """Return the schedule of that name: of a class statement, else one that was unpickled."""
    if name in Schedule._defined:
        return Schedule._defined[name]
    found = [cls for cls in _subclasses(Schedule) if cls.__name__ == name]
    filled = [cls for cls in found if has_body(cls)]
    return filled[-1] if filled else next(iter(found), None)


def _subclasses(cls: type) -> Iterator[type[Schedule]]:
    subclasses: Sequence[type[Schedule]] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)
