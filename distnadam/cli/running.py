"""The commands on a named optimizer that runs on a Ray cluster: status, save, stop."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from distnadam.cli.group import JSON, echo_json, exit_on_error, main, plain_console
from distnadam.client.status import RunningOptimizer, Status
from distnadam.errors import ConfigError
from distnadam.optimizer import DistNadam
from distnadam.places import shown
from distnadam.training import panel
from distnadam.training.observed_run import ObservedRun
from distnadam.training.progress import can_show_panel

_F = TypeVar("_F", bound=Callable[..., Any])
_RATE_S = 1.0
"""Seconds over which a single report measures the rate of steps."""


def on_running(command: _F) -> _F:
    """Add the argument NAME, a running optimizer's, and the option --address, its cluster's."""
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
@click.option(
    "--watch",
    is_flag=True,
    help="Show the panel of `train`, or a report each time where none can be drawn, until Ctrl-C.",
)
@click.option(
    "--every",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Time between two reports.",
)
@JSON
def status(name: str, address: str | None, *, watch: bool, every: float, as_json: bool) -> None:
    """Show the running optimizer NAME.

    Steps, shards, standbys, workers, what the next step waits for, the bytes per second of each
    host, a host that is slower than the others with what that costs, and the last checkpoint.
    """
    with exit_on_error():
        with joined(address):
            running = RunningOptimizer.named(name)
        reports = _reports(running, every if watch else _RATE_S)
        if as_json:
            for report in reports if watch else [next(reports)]:
                echo_json(report.to_dict())
        elif not (watch and can_show_panel(screen := plain_console(soft_wrap=False))):
            for report in reports if watch else [next(reports)]:
                plain_console().print(render(report))
        else:
            with Live(console=screen, auto_refresh=False) as live:
                seen = ObservedRun(name)
                for report in reports:
                    shown_now = panel.render(seen.view(report))
                    live.update(panel.above_a_free_line(shown_now), refresh=True)


@main.command()
@on_running
@click.argument("path", required=False)
@JSON
def save(name: str, address: str | None, path: str | None, *, as_json: bool) -> None:
    """Save the running optimizer NAME under PATH, a directory or URL.

    Without PATH it is saved where it was saved last.
    """
    with exit_on_error():
        with joined(address):
            running = RunningOptimizer.named(name)
        directory = path or running.checkpoint_dir()
        if directory is None:
            raise ConfigError(f"{name}: was never saved and has no checkpoint_dir: give a PATH")
        with DistNadam.connect(name) as optimizer:
            saved = shown(optimizer.save(directory))
    if as_json:
        echo_json({"checkpoint": saved})
    else:
        click.echo(saved)


@main.command()
@on_running
def stop(name: str, address: str | None) -> None:
    """End the running optimizer NAME without saving; its workers' next call raises an error."""
    with exit_on_error(), joined(address):
        DistNadam.stop(name)
    click.echo(f"{name}: ended")


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address`, else at RAY_ADDRESS, with Ray's own output hidden.

    Ray joins in the body, at the first call that needs it.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    # how often, a second each, Ray tries a cluster that refuses it
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    if sys.stderr is not None and sys.stderr.isatty():  # it takes some seconds
        where = os.environ.get("RAY_ADDRESS")
        click.echo(f"joining the Ray at {where}" if where else "looking for a Ray here", err=True)
    with tempfile.TemporaryFile() as hidden:
        stderr = os.dup(2)
        os.dup2(hidden.fileno(), 2)  # Ray's core writes to the descriptor itself
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def render(status: Status) -> RenderableType:
    """Return a status as tables."""
    rate = "" if status.steps_per_s is None else f", {status.steps_per_s:.1f} steps/s"
    skipped = f", {status.skipped} rounds skipped or refused" if status.skipped else ""
    shards, standbys = Table(title="shards"), Table("shard", "node", "lag", title="standbys")
    for heading in ("shard", "node", "state", "round", "MiB"):
        shards.add_column(heading, no_wrap=True)
    for shard in status.shards:
        cells = [
            str(shard.index),
            shard.node,
            shard.state,
            "" if shard.round is None else str(shard.round),
            "" if shard.bytes is None else f"{shard.bytes / 2**20:.1f}",
        ]
        shards.add_row(*cells)
        standbys.add_row(
            cells[0],
            shard.standby or "none yet",
            "not filled yet" if shard.lag is None else f"{shard.lag} rounds",
        )
    workers = Table("rank", "state", title="workers")
    for rank, state in status.workers.items():
        workers.add_row(str(rank), state)
    hosts = Table("host", "sends MB/s", "receives MB/s", title="between hosts, by TCP")
    for host in status.hosts:
        rates = (host.sent_bytes_per_s, host.received_bytes_per_s)
        hosts.add_row(host.host, *("" if rate is None else f"{rate / 1e6:.1f}" for rate in rates))
    norm = "" if status.gradient_norm is None else f", gradient norm {status.gradient_norm:.4g}"
    scale = "" if status.loss_scale is None else f", loss scale {status.loss_scale:g}"
    head = f"{status.name}: step {status.step}{rate}, lr {status.lr:g}{norm}{scale}{skipped}"
    return Group(
        head,
        shards,
        *([standbys] if status.replicas else []),
        workers,
        *([hosts] if status.hosts else []),
        *(host.in_words() for host in status.slow),
        *([f"optimizer: {status.method}"] if status.method else []),
        f"the next step waits for {status.awaited}",
        f"transport: {status.transport}",
        f"last checkpoint: {status.checkpoint or 'none'}",
    )


def _reports(running: RunningOptimizer, every: float) -> Iterator[Status]:
    """Yield the status every so many seconds, the first one after the time to measure a rate."""
    seen = running.status()
    while True:
        time.sleep(every)
        seen = running.status(seen)
        yield seen
