"""The options of `plan` and `doctor` that say how a model is distributed over its hosts."""

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import click

from distnadam.cli.counts import COUNT
from distnadam.planning.planned_run import PlannedRun

_F = TypeVar("_F", bound=Callable[..., Any])

NAMES = ("workers_per_host", "shards", "replicas", "sum_group", "dtype", "ema")


def planned_run_options(*, otherwise: tuple[str, str]) -> Callable[[_F], _F]:
    """Return what adds the options to a command.

    Args:
        otherwise: what number of shards, and what group, there is where none is given.
    """
    shards, group = otherwise
    options = [
        click.option(
            "--workers-per-host", type=COUNT, default=1, help="Ranks on each host.  [default: 1]"
        ),
        click.option("--shards", type=COUNT, help=f"Shards in all.  [default: {shards}]"),
        click.option(
            "--replicas",
            type=click.IntRange(0, 1),
            default=0,
            help="Standbys of a shard.  [default: 0]",
        ),
        click.option("--sum-group", type=COUNT, help=f"Ranks summed first.  [default: {group}]"),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            default="float32",
            help="Of gradients and pulled parameters on their way.  [default: float32]",
        ),
        click.option("--ema", is_flag=True, help="The shards keep an average of the parameters."),
    ]

    def add(command: _F) -> _F:
        return reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return add


def planned_run(
    given: dict[str, Any], *, parameters: int, hosts: int, shard_hosts: int = 0
) -> PlannedRun:
    """Return what is planned, by the values of the options.

    Raises:
        ConfigError: a group would lie on two hosts.
    """
    half = given["dtype"] == "bfloat16"
    return PlannedRun(
        parameters=parameters,
        hosts=hosts,
        workers_per_host=given["workers_per_host"],
        shards=given["shards"],
        shard_hosts=shard_hosts,
        replicas=given["replicas"],
        sum_group=given["sum_group"] or 1,
        half_gradients=half,
        half_parameters=half,
        ema=given["ema"],
    )
