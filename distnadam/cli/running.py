"""The commands on a named optimizer that runs somewhere else on a Ray cluster: how it goes, save
it, cut it anew, end it.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from distnadam.cli.group import JSON, errors_told, main, verbatim
from distnadam.client.status import RunningOptimizer, Status
from distnadam.errors import ConfigError
from distnadam.optimizer import DistNadam
from distnadam.training.checkpoint_manager import data_of_run

_F = TypeVar("_F", bound=Callable[..., Any])
_RATE_S = 1.0


def on_running(command: _F) -> _F:
    """Give a command the name of a running optimizer, and the address of its Ray."""
    for decorate in (
        click.option(
            "--address", metavar="HOST:PORT", help="The Ray cluster's head.  [default: RAY_ADDRESS]"
        ),
        click.argument("name"),
    ):
        command = decorate(command)
    return command


@main.command()
@on_running
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option(
    "--every",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Between two looks.",
)
@JSON
def status(name: str, address: str | None, *, watch: bool, every: float, as_json: bool) -> None:
    """Show what the running optimizer NAME does: steps, shards, standbys and their nodes, workers,
    the last checkpoint.
    """
    with errors_told():
        with joined(address):
            running = RunningOptimizer(name)
        looks = _looks(running, every if watch else _RATE_S)
        if as_json:
            for seen in looks if watch else [next(looks)]:
                click.echo(json.dumps(seen.to_dict()))
        elif not watch:
            verbatim().print(shown(next(looks)))
        else:
            with Live(console=verbatim(soft_wrap=False), auto_refresh=False) as live:
                for seen in looks:
                    live.update(shown(seen), refresh=True)


@main.command()
@on_running
@click.argument("path", required=False)
@JSON
def save(name: str, address: str | None, path: str | None, *, as_json: bool) -> None:
    """Write a checkpoint of the running optimizer NAME under PATH, a directory or URL, or where it
    saved last.
    """
    with errors_told():
        with joined(address):
            running = RunningOptimizer(name)
        where = path or running.checkpoint_dir()
        if where is None:
            raise ConfigError(f"{name}: was never saved and has no checkpoint_dir: give a PATH")
        with DistNadam.connect(name) as optimizer:
            saved = optimizer.save(where, data=data_of_run(where))
    click.echo(json.dumps({"checkpoint": saved}) if as_json else saved)


@main.command()
@on_running
@click.argument("shards", type=click.IntRange(1))
def reshard(name: str, address: str | None, shards: int) -> None:
    """Cut the state of the running optimizer NAME anew into SHARDS shards, between two steps."""
    with errors_told():
        with joined(address):
            optimizer = DistNadam.connect(name)
        with optimizer:
            optimizer.reshard(shards)
    click.echo(f"{name}: {shards} shard(s)")


@main.command()
@on_running
def stop(name: str, address: str | None) -> None:
    """End the running optimizer NAME, without saving; its workers, and whoever trains with it, are
    told.
    """
    with errors_told(), joined(address):
        DistNadam.stop(name)
    click.echo(f"{name}: ended")


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Have Ray join the cluster at an address, else at RAY_ADDRESS, once it is used; what Ray
    itself says of that is not shown.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    os.environ.setdefault(
        "RAY_NUM_REDIS_GET_RETRIES", "3"
    )  # times that Ray asks a cluster which refuses it, a second each
    with tempfile.TemporaryFile() as unseen:
        kept = os.dup(2)
        os.dup2(unseen.fileno(), 2)  # its core writes there itself
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def shown(seen: Status) -> RenderableType:
    """Return a status as tables."""
    rate = "" if seen.steps_per_s is None else f", {seen.steps_per_s:.1f} steps/s"
    skipped = f", {seen.skipped} rounds skipped or refused" if seen.skipped else ""
    shards, standbys = Table(title="shards"), Table("shard", "node", "lag", title="standbys")
    for heading in ("shard", "node", "state", "round", "MiB"):
        shards.add_column(heading, no_wrap=True)
    for shard in seen.shards:
        cells = [
            str(shard.index),
            shard.node,
            shard.state,
            _told(shard.round),
            "" if shard.bytes is None else f"{shard.bytes / 2**20:.1f}",
        ]
        shards.add_row(*cells)
        standbys.add_row(
            cells[0],
            shard.standby or "none yet",
            "not filled yet" if shard.lag is None else f"{shard.lag} rounds",
        )
    workers = Table("rank", "state", title="workers")
    for rank, state in seen.workers.items():
        workers.add_row(str(rank), state)
    head = f"{seen.name}: step {seen.step}{rate}, lr {seen.lr:g}{skipped}"
    return Group(
        head,
        shards,
        *([standbys] if seen.replicas else []),
        workers,
        f"last checkpoint: {seen.checkpoint or 'none'}",
    )


def _looks(running: RunningOptimizer, every: float) -> Iterator[Status]:
    """Yield one look after another, the first once there is a rate to tell."""
    seen = running.look()
    while True:
        time.sleep(every)
        seen = running.look(seen)
        yield seen


def _told(value: int | None) -> str:
    return "" if value is None else str(value)
