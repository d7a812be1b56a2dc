"""The command `report`, which writes a page on runs."""

from pathlib import Path

import click

from distnadam.checkpoint.storage.base import os_errors_as
from distnadam.cli.group import exit_on_error, main
from distnadam.places import local_path


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    default="report.html",
    show_default=True,
    help="The page: one file, which needs no network.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Read every byte of the checkpoints, for their verdict.",
)
def report(runs: tuple[str, ...], *, output: str, verify: bool) -> None:
    """Write a page on runs, whose metrics.csv are in the directories RUN...

    Curves of all runs together, where a step's time goes, recoveries, checkpoints, hosts, and the
    configurations side by side.
    """
    with exit_on_error():
        from distnadam.report.data import read_run
        from distnadam.report.page import page

        found = [read_run(Path(local_path(run, "RUN")), verify=verify) for run in runs]
        path = Path(local_path(output, "--output"))
        text = page(found)
        with os_errors_as(path, "written"):
            path.write_text(text, encoding="utf-8")
        click.echo(path)
