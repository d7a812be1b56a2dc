"""Arguments that must be counts, numbers, flags, names or ports: refused by name where they are
passed; and records of them as plain data.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from distnadam.errors import ConfigError

BETAS = ("beta_1", "beta_2")
"""The names of the decays of the moments, of an optimizer or a group."""
_MOST_PORT = 65535
_MOST = 2**63 - 1
"""The largest number that messages, checkpoints and arrays of whole numbers all hold."""
_MOST_PROCESSES = 65536
_NUMPY_BOOLS = {("numpy", "bool"), ("numpy", "bool_")}


def check_count(name: str, value: object, *, least: int = 1, most: float = _MOST) -> int:
    """Return `value` as an int; raise ConfigError, naming the argument, unless it lies in
    [least, most].
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value.__index__() > most:
        raise ConfigError(f"{name} must be a whole number of at most {most}, got {value!r}")
    return int(value.__index__())


def check_processes(name: str, value: object) -> int:
    """Return a number of shards or workers; raise ConfigError, naming the argument, unless it is
    one that can be made a list of.
    """
    return check_count(name, value, most=_MOST_PROCESSES)


def check_shares(value: Any, count: int) -> list[int]:
    """Return the shares of `count` shards, equal ones for None; raise ConfigError if they cannot be
    that.
    """
    if value is None:
        return [1] * count
    try:
        shares = [check_count("a share", share, least=0, most=math.inf) for share in value]
    except (ConfigError, TypeError):
        shares = []
    if len(shares) != count or not any(shares):
        raise ConfigError(
            f"shares: expected {count} whole numbers, none below 0 and not all 0, got {value!r}"
        )
    return shares


def check_ports(value: Any) -> tuple[int, int]:
    """Return the first and the last port; raise ConfigError unless they are ports in order."""
    try:
        first, last = (check_count("port_range", port) for port in value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"port_range must be two ports, the first and the last, got {value!r}"
        ) from error
    if not first <= last <= _MOST_PORT:
        raise ConfigError(
            f"port_range must be two ports in order, at most {_MOST_PORT}, got {value!r}"
        )
    return first, last


def check_name(name: object) -> str:
    """Return an optimizer's name; raise ConfigError if it is not a legal one."""
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name)):
        raise ConfigError(
            f"name must be up to 63 letters, digits, dots, dashes or underscores, got {name!r}"
        )
    return name


def check_as(kind: type, name: str, value: Any) -> Any:
    """Return a str, or a finite float of at least 0; raise ConfigError naming the argument."""
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name} must be a string, got {value!r}")
        return value
    try:
        number = float(value) if not isinstance(value, (bool, str)) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(number) or number < 0.0:
        raise ConfigError(f"{name} must be finite and at least 0, got {value!r}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return True or False, NumPy's too; raise ConfigError, naming the argument, for anything
    else.
    """
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__) not in _NUMPY_BOOLS:
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def set_number(record: object, name: str) -> float:
    """Check that a field of a frozen record is a finite number of at least 0, and store it as a
    float.
    """
    number: float = check_as(float, name, getattr(record, name))
    object.__setattr__(record, name, number)
    return number


def check_beta(record: object, name: str) -> None:
    """Check that a field of a frozen record is the decay of a moment, and store it as a float."""
    if not 0.0 <= set_number(record, name) < 1.0:
        raise ConfigError(f"{name} must be in [0, 1), got {getattr(record, name)!r}")


def fields_of(record: Any) -> dict[str, Any]:
    """Return a dataclass's fields by name; mappings among them as dicts of their own."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
