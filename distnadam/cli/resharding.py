"""The command that cuts a running optimizer's state anew: `reshard`."""

import time

import click
from rich.table import Table

from distnadam.cli.group import exit_on_error, main, plain_console
from distnadam.cli.running import joined, on_running
from distnadam.client.status import RunningOptimizer, Status
from distnadam.errors import StepTimeout
from distnadam.optimizer import DistNadam
from distnadam.planning.balance import Cut, best_cut, shares_of


@main.command()
@on_running
@click.argument("shards", type=click.IntRange(1), required=False)
@click.option(
    "--balance",
    is_flag=True,
    help="Keep the number of shards, and give each host as much of the state as makes a step "
    "shortest, by what its cable and its CPU are seen to do.",
)
@click.option("--dry-run", is_flag=True, help="With --balance: say what it would do, no more.")
@click.option(
    "--over",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="With --balance: how long to look at the run before.",
)
def reshard(
    name: str,
    address: str | None,
    shards: int | None,
    *,
    balance: bool,
    dry_run: bool,
    over: float,
) -> None:
    """Move the state of the running optimizer NAME to SHARDS shards, between two steps.

    With --balance it stays on as many shards, of sizes by what their hosts can do. The bits of a
    run do not depend on how its state is cut.
    """
    if balance == (shards is not None):
        raise click.UsageError("expected either SHARDS or --balance")
    if dry_run and not balance:
        raise click.UsageError("--dry-run goes with --balance")
    with exit_on_error():
        with joined(address):
            optimizer = DistNadam.connect(name)
            running = RunningOptimizer.named(name)
        with optimizer:
            if shards is not None:
                optimizer.reshard(shards)
                click.echo(f"{name}: {shards} shard(s)")
                return
            seen = _watched(running, over)
            cut = best_cut(seen.paces)
            for host in seen.slow:
                click.echo(host.in_words())
            plain_console().print(_table(cut))
            if not cut.pays:
                click.echo(f"{name}: stays as it is: no cut makes a step noticeably shorter")
                return
            click.echo(f"the slowest host's part of a step: {cut.gain:.2f} times as short")
            if not dry_run:
                shares = shares_of(seen.paces, cut.after)
                optimizer.reshard(len(shares), shares=shares)
                click.echo(f"{name}: {len(shares)} shard(s) by what their hosts can do")


def _watched(running: RunningOptimizer, over: float) -> Status:
    """Return the status after so many seconds, with the hosts' paces.

    Raises:
        StepTimeout: no round was decided, or shards were replaced meanwhile.
    """
    first = running.status()
    time.sleep(over)
    seen = running.status(first)
    if not seen.paces:
        raise StepTimeout(
            f"reshard: in {over:g} s not every shard decided a round, or shards were replaced: "
            "nothing is known of the hosts; give --over more seconds, or try again"
        )
    return seen


def _table(cut: Cut) -> Table:
    table = Table("host", title="parameters by host, and its part of a step")
    for heading in ("now", "then", "ms now", "ms then"):
        table.add_column(heading, justify="right")
    for host, seconds in cut.seconds_before.items():
        held = (f"{counts.get(host, 0):,}" for counts in (cut.before, cut.after))
        times = (f"{1e3 * each:.2f}" for each in (seconds, cut.seconds_after[host]))
        table.add_row(host, *held, *times)
    return table
