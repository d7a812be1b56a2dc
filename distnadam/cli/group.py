"""What all commands share: their group, recurring options, the console, and exit codes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from distnadam.errors import DistNadamError

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distnadam")
def main() -> None:
    """Train with a sharded Nadam parameter server, and look after its checkpoints."""


def plain_console(*, soft_wrap: bool = True) -> Console:
    """Return a console on standard output that prints brackets and colons as they are."""
    return Console(soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of this package as one line and exit with 1; exit with 130 after Ctrl-C."""
    try:
        yield
    except DistNadamError as error:
        click.echo(f"distnadam: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            click.echo(note, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
