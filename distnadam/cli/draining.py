"""The commands on a host that is to be left: `drain`, `uncordon`, and `notice`, which waits."""

import time
from typing import Any

import click

from distnadam.backends import factory
from distnadam.backends.notices import CLOUDS, await_notice
from distnadam.cli.group import exit_on_error, main
from distnadam.cli.running import joined
from distnadam.errors import StepTimeout

_LOOK_EVERY_S = 1.0
_ADDRESS = click.option(
    "--address", metavar="HOST:PORT", help="The Ray cluster's head.  [default: RAY_ADDRESS]"
)


@main.command()
@click.argument("host")
@_ADDRESS
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Give up waiting, and exit with 1; the host stays cordoned.  [default: wait]",
)
def drain(host: str, address: str | None, *, timeout: float | None) -> None:
    """Have shards, standbys and ranks leave HOST between two rounds, and say when it is empty.

    HOST is a node's address, name or id. Nothing goes there again until `uncordon`. The bits of
    every run stay. Programs that have joined Ray on HOST, and ranks that are processes of your own,
    are yours to move: they are listed as long as they run, and so is the relay that serves them.
    """
    with exit_on_error(), joined(address):
        hosts = factory.hosts()
        node = hosts.cordon(host)
        deadline = None if timeout is None else time.monotonic() + timeout
        before: list[str] | None = None
        while left := hosts.processes_on(node):
            if left != before:
                click.echo(f"{host}: leaving: {', '.join(left)}")
                before = left
            if deadline is not None and time.monotonic() >= deadline:
                raise StepTimeout(
                    f"{host}: after {timeout:g} s there is still {', '.join(left)}; it stays "
                    "cordoned"
                )
            time.sleep(_LOOK_EVERY_S)
        click.echo(f"{host}: is empty; `distnadam uncordon {host}` takes it back")


@main.command()
@click.argument("host")
@_ADDRESS
def uncordon(host: str, address: str | None) -> None:
    """Let shards, standbys and ranks go to HOST again."""
    with exit_on_error(), joined(address):
        factory.hosts().uncordon(host)
        click.echo(f"{host}: is used again")


@main.command()
@click.option(
    "--from",
    "cloud",
    required=True,
    type=click.Choice(list(CLOUDS)),
    help="The cloud whose metadata service to ask.",
)
@_ADDRESS
@click.option("--metadata", metavar="URL", help="The service's address.  [default: the cloud's]")
@click.option(
    "--every",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Time between two looks.",
)
def notice(cloud: Any, address: str | None, *, metadata: str | None, every: float) -> None:
    """Wait for a cloud's notice that this host goes away, and have Ray drain it.

    Run it on every host that may be taken away, beside Ray's node.
    """
    with exit_on_error(), joined(address):
        hosts = factory.hosts()
        found = await_notice(cloud, metadata, every)
        hosts.announce(found.why, found.left_s)
        click.echo(f"{found.why}: {found.left_s:.0f} s are left; the host is being drained")
