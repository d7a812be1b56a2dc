"""What every command shares: the group they are in, the options that recur, and how an error is
told.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from distnadam.errors import DistNadamError

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distnadam")
def main() -> None:
    """Train with a sharded Nadam parameter server, and look after its checkpoints."""


def verbatim(*, soft_wrap: bool = True) -> Console:
    """Return where tables go: what is in them, such as a path of the user's, is shown as it is,
    brackets and colons too.
    """
    return Console(soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn our errors into one sentence and exit code 1, and Ctrl-C into 130."""
    try:
        yield
    except DistNadamError as error:
        click.echo(f"distnadam: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            click.echo(note, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
