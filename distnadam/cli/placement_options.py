"""The options of `train` for the nodes of shards and workers, and what they request of Ray."""

from functools import reduce
from typing import Any

import click


def _labels(
    context: click.Context, option: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, str]:
    """Return KEY=VALUE pairs as a mapping; raise BadParameter, naming it, for anything else."""
    for pair in pairs:
        if not all(pair.partition("=")[::2]):
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", context, option)
    return dict(pair.split("=", 1) for pair in pairs)


PLACEMENT = [
    click.option(
        "--shard-cpus",
        default=0.0,
        type=click.FloatRange(0),
        help="CPUs that each shard requests of Ray.  [default: 0]",
    ),
    click.option(
        "--worker-cpus",
        default=0.0,
        type=click.FloatRange(0),
        help="CPUs that each worker requests of Ray.  [default: 0]",
    ),
    click.option(
        "--worker-gpus",
        default=0.0,
        type=click.FloatRange(0),
        help="GPUs that each worker requests of Ray; 0.5 shares one.  [default: 0]",
    ),
    click.option(
        "--shard-label",
        multiple=True,
        callback=_labels,
        metavar="KEY=VALUE",
        help="Label of the Ray nodes that shards go to.",
    ),
    click.option(
        "--worker-label",
        multiple=True,
        callback=_labels,
        metavar="KEY=VALUE",
        help="Label of the Ray nodes that workers go to.",
    ),
    click.option(
        "--start-timeout",
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="Wait so long for nodes.  [default: refuse at once]",
    ),
    click.option(
        "--port-range",
        type=(int, int),
        metavar="FIRST LAST",
        help="TCP ports at which shards listen for other hosts.  [default: any]",
    ),
]


def placement(command: Any) -> Any:
    """Add the options for the nodes of shards and workers and the resources they request."""
    return reduce(lambda decorated, option: option(decorated), reversed(PLACEMENT), command)
