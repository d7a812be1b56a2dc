"""The commands `export` and `import`, which exchange checkpoints with other frameworks."""

import json
from collections.abc import Mapping
from typing import Any

import click

from distnadam.cli.group import JSON, echo_json, exit_on_error, main
from distnadam.interop import FORMATS, Converted, export_checkpoint, import_checkpoint
from distnadam.places import shown
from distnadam.plain_data import NOT_PARSED


def _names(context: click.Context, option: click.Parameter, text: str | None) -> list[str] | None:
    """Return the names of a list with commas."""
    return None if text is None else text.split(",")


def _settings(
    context: click.Context, option: click.Parameter, text: str | None
) -> Mapping[str, Any]:
    """Return the mapping of a JSON text; raise UsageError if it is none."""
    try:
        settings = json.loads(text or "{}")
    except NOT_PARSED as error:
        raise click.UsageError(f"--config: expected JSON, got {text!r}: {error}") from error
    if not isinstance(settings, dict):
        raise click.UsageError(f"--config: expected a JSON object, got {text!r}")
    return settings


_LOSSY = click.option(
    "--lossy", is_flag=True, help="Convert even if the other formula would train on differently."
)
_ORDER = click.option(
    "--order",
    metavar="NAMES",
    callback=_names,
    help="Tensors, with commas between, in the order of the other optimizer's variables; "
    "without it, in the order given to build, or in SOURCE's.",
)


@main.command("export")
@click.argument("checkpoint")
@click.argument("output")
@click.option(
    "--to", required=True, type=click.Choice(FORMATS), help="The framework or format of OUTPUT."
)
@click.option("--parameters-only", is_flag=True, help="Leave the slots out (safetensors, numpy).")
@_ORDER
@_LOSSY
@JSON
def export(
    checkpoint: str,
    output: str,
    *,
    to: Any,
    parameters_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write CHECKPOINT as a file that another framework continues from.

    A directory of checkpoints means its newest valid one.
    """
    with exit_on_error():
        done = export_checkpoint(checkpoint, output, to=to, slots=not parameters_only, **options)
        _print_result(done, as_json)


@main.command("import")
@click.argument("source")
@click.argument("directory")
@click.option(
    "--from",
    "source_format",
    required=True,
    type=click.Choice(FORMATS),
    help="The framework or format of SOURCE.",
)
@click.option(
    "--config",
    metavar="JSON",
    callback=_settings,
    help="Hyper-parameters SOURCE lacks, or instead of its own: '{\"lr\": 0.01}'.",
)
@_ORDER
@_LOSSY
@JSON
def import_(source: str, directory: str, *, as_json: bool, **options: Any) -> None:
    """Write another framework's SOURCE as a checkpoint in DIRECTORY."""
    with exit_on_error():
        _print_result(import_checkpoint(source, directory, **options), as_json)


def _print_result(done: Converted, as_json: bool) -> None:
    if as_json:
        echo_json({"path": shown(done.path), "notes": done.notes})
        return
    for note in done.notes:
        click.echo(note, err=True)
    click.echo(shown(done.path))
