"""The command that says what would run here."""

import json
import sys

import click
from rich.table import Table

from distnadam.cli.group import JSON, main, verbatim
from distnadam.diagnosis import diagnose


@main.command()
@JSON
def doctor(*, as_json: bool) -> None:
    """Say what would run here: versions, Ray, shared memory, kernel, transport; exit 1 where something is wrong."""
    found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        table = Table(show_header=False)
        for key, value in found.to_dict().items():
            if key == "versions":
                for package, version in value.items():
                    table.add_row(package, version or "not installed")
            elif key != "problems":
                table.add_row(key.replace("_", " "), "not set" if value is None else str(value))
        verbatim().print(table)
        for problem in found.problems:
            click.echo(f"problem: {problem}", err=True)
    if found.problems:
        sys.exit(1)
