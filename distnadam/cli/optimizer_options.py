"""The options of `train` for the optimizer: which one, its hyper-parameters, its learning rate."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import click

from distnadam import schedules
from distnadam.checks import fields_of
from distnadam.errors import ConfigError
from distnadam.optimizer import DistNadam
from distnadam.schedules import Rate, Schedule, Warmup, rate_at
from distnadam.training.resuming import config_given_before
from distnadam.variants import DistAdam, DistAdamW, DistNadamW

_OPTIMIZERS: dict[str, type[DistNadam]] = {
    "nadam": DistNadam,
    "nadamw": DistNadamW,
    "adam": DistAdam,
    "adamw": DistAdamW,
}
_SCHEDULES: dict[str, type[Schedule]] = {
    "constant": schedules.Constant,
    "cosine-restarts": schedules.CosineRestarts,
    "exponential": schedules.Exponential,
    "inverse-square-root": schedules.InverseSquareRoot,
    "one-cycle": schedules.OneCycle,
    "piecewise": schedules.Piecewise,
    "polynomial": schedules.Polynomial,
    "warmup-cosine": schedules.WarmupCosine,
}
"""What a command line can say; schedules of schedules, but for a warm-up, are for `fit`."""
_HYPERPARAMETERS = (
    *("weight_decay", "beta_1", "beta_2", "epsilon"),
    *("clipnorm", "clipvalue", "global_clipnorm"),
)
_AVERAGE = {"ema": "ema_momentum", "ema_overwrite_every": "ema_overwrite_frequency"}
"""The options of the average of the parameters, and the settings that they are."""
OPTIMIZER_OPTIONS = (
    *("optimizer", "lr", "lr_schedule", "warmup_steps"),
    *(*_HYPERPARAMETERS, *_AVERAGE),
)
"""Names of all options here."""


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _each(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(map(read, text.split("/"))) if text else ()


_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a finite number", _real),
    bool: ("true or false", _flag),
    tuple[int, ...]: ("whole numbers with / between them", _each(int)),
    tuple[float, ...]: ("finite numbers with / between them", _each(_real)),
}
"""By the type of a schedule's field: what is expected, and what reads it."""


_EXAMPLES = {"piecewise": "; such as boundaries=100/200,rates=0.1/0.02/0.01"}
"""What is said of schedules whose fields are several values."""


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _fields(kind: Any) -> str:
    """Return the fields of a schedule, with their defaults, as a command line has them."""
    return ",".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={_written(f.default)}"
        for f in dataclasses.fields(kind)
    )


SCHEDULE_ROWS = [
    (name, _fields(kind).replace(",", ", ") + _EXAMPLES.get(name, ""))
    for name, kind in _SCHEDULES.items()
]
"""The schedules and their fields, for `--help`."""


def schedule_of(text: str) -> Schedule:
    """Return the schedule of NAME:FIELD=VALUE,FIELD=VALUE,...

    Raises:
        BadParameter: naming the schedule, its fields and the given value.
    """
    name, _, rest = text.partition(":")
    if name not in _SCHEDULES:
        raise _refused(text, f"there is no schedule {name!r}; known are {', '.join(_SCHEDULES)}")
    kind: Any = _SCHEDULES[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    try:
        for pair in rest.split(",") if rest else ():
            key, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"{pair!r} is not FIELD=VALUE")
            if key not in fields:
                raise ConfigError(f"it has no field {key!r}")
            if key in values:
                raise ConfigError(f"{key} is given twice")
            values[key] = _read(fields[key], value)
        required = (f.name for f in fields.values() if f.default is dataclasses.MISSING)
        if missing := [field for field in required if field not in values]:
            raise ConfigError(f"{', '.join(missing)} must be given")
        schedule: Schedule = kind(**values)
        rate_at(schedule, 0)
    except ConfigError as error:
        said = str(error).removeprefix(f"{kind.__name__}: ")
        raise _refused(text, f"{name}: {said}; its fields are {_fields(kind)}") from error
    return schedule


def _read(field: Any, text: str) -> Any:
    expected, read = _READERS.get(field.type, ("", str))
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{field.name} must be {expected}, got {text!r}") from error


def _refused(text: str, why: str) -> click.BadParameter:
    return click.BadParameter(f"{text!r}: {why}", param_hint="--lr-schedule")


def _checked(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """Return what was written, which the command to resume repeats, if it is a schedule."""
    if text is not None:
        schedule_of(text)
    return text


_OPTIONS = [
    click.option(
        "--optimizer",
        type=click.Choice(list(_OPTIMIZERS)),
        help="Which optimizer.  [default: nadam]",
    ),
    click.option(
        "--lr",
        type=float,
        help="Learning rate.  [default: 0.002; of adam and adamw 0.001]",
    ),
    click.option(
        "--lr-schedule",
        callback=_checked,
        metavar="NAME:FIELD=VALUE,...",
        help="Learning rate by step, in place of --lr, such as "
        "polynomial:initial=0.1,total_steps=1000; see below.",
    ),
    click.option(
        "--warmup-steps",
        type=click.IntRange(1),
        help="Steps of a linear rise before --lr or --lr-schedule, whose own steps count from "
        "its end.  [default: none]",
    ),
    click.option(
        "--weight-decay",
        type=float,
        help="What a step takes from each parameter, times the learning rate.  [default: 0; of "
        "nadamw and adamw 0.01]",
    ),
    click.option("--beta-1", type=float, help="Decay of the first moment.  [default: 0.9]"),
    click.option("--beta-2", type=float, help="Decay of the second moment.  [default: 0.999]"),
    click.option(
        "--epsilon", type=float, help="Added to the root of the second moment.  [default: 1e-07]"
    ),
    click.option(
        "--clipnorm", type=float, help="Largest norm of each tensor's gradient.  [default: any]"
    ),
    click.option(
        "--clipvalue",
        type=float,
        help="Largest magnitude of each element of the gradient.  [default: any]",
    ),
    click.option(
        "--global-clipnorm",
        type=float,
        help="Largest norm of the gradient over all tensors.  [default: any]",
    ),
    click.option(
        "--ema",
        type=float,
        metavar="MOMENTUM",
        help="Keep an average of the parameters, in which the one so far has this weight, such as "
        "0.99.  [default: none]",
    ),
    click.option(
        "--ema-overwrite-every",
        type=click.IntRange(1),
        metavar="STEPS",
        help="Steps after which the parameters become that average.  [default: never]",
    ),
]


def optimizer_options(command: Any) -> Any:
    """Add the options for the optimizer and its learning rate."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)


def asked_rate(options: Mapping[str, Any]) -> Rate | None:
    """Return the learning rate that a command line asks for; None where it says nothing of it.

    Raises:
        UsageError: two options contradict each other.
        ConfigError: the rate is none that a warm-up can lead to.
    """
    lr, text, warmup = options["lr"], options["lr_schedule"], options["warmup_steps"]
    if lr is not None and text is not None:
        raise click.UsageError(f"--lr {lr} and --lr-schedule {text}: give one of them")
    rate = lr if text is None else schedule_of(text)
    if warmup is None:
        return rate
    if rate is None:
        raise click.UsageError(
            f"--warmup-steps {warmup}: give the rate that follows too, by --lr or --lr-schedule"
        )
    return Warmup(rate, warmup)


def optimizer_asked_for(
    options: Mapping[str, Any], rate: Rate | None, /, **others: Any
) -> DistNadam:
    """Return the optimizer that a command line asks for, not built.

    What it does not say is as in the run that it resumes, if any, else the optimizer's default.
    `fit` refuses what that run cannot change.

    Args:
        options: values of the options of the command.
        rate: of `asked_rate`.
        others: further arguments of the optimizer.

    Raises:
        ConfigError: a value is out of its range.
    """
    given = {name: options[name] for name in _HYPERPARAMETERS if options[name] is not None}
    if rate is not None:
        given["lr"] = rate
    average = {ours: options[name] for name, ours in _AVERAGE.items() if options[name] is not None}
    given |= average | ({"use_ema": True} if average else {})
    asked, where = options["optimizer"], options["checkpoint_dir"]
    before = None if where is None else config_given_before(where, rate)
    if before is None:
        return _OPTIMIZERS[asked or "nadam"](**given, **others)
    settings = fields_of(before) | given
    if asked is not None:
        theirs = _OPTIMIZERS[asked]().get_config()
        settings["formula"] = theirs["formula"]
        if before.formula != theirs["formula"]:
            settings["schedule_decay"] = theirs["schedule_decay"]
        if "weight_decay" not in given and asked.endswith("w") != (before.weight_decay > 0.0):
            settings["weight_decay"] = theirs["weight_decay"]
    return DistNadam(**settings, **others)
