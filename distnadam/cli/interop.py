"""The commands that exchange checkpoints with other frameworks, and say what did not carry over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from distnadam.cli.group import JSON, PATH, errors_told, main
from distnadam.interop import FORMATS, Converted, export_checkpoint, import_checkpoint

_LOSSY = click.option(
    "--lossy", is_flag=True, help="Convert even where the other formula trains on differently."
)
_ORDER = click.option(
    "--order",
    metavar="NAMES",
    help="Tensors, with commas between, in the order of the other optimizer's variables.",
)


@main.command("export")
@click.argument("checkpoint")
@click.argument("output", type=PATH)
@click.option(
    "--to", required=True, type=click.Choice(FORMATS), help="The framework or format of OUTPUT."
)
@click.option("--parameters-only", is_flag=True, help="Leave the slots out (safetensors, numpy).")
@_ORDER
@_LOSSY
@JSON
def export(
    checkpoint: str,
    output: Path,
    *,
    to: Any,
    parameters_only: bool,
    order: str | None,
    lossy: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT, or the newest valid one in a directory, as a file that another framework
    continues from.
    """
    with errors_told():
        _tell(
            export_checkpoint(
                checkpoint,
                output,
                to=to,
                slots=not parameters_only,
                order=_names(order),
                lossy=lossy,
            ),
            as_json,
        )


@main.command("import")
@click.argument("source", type=PATH)
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
    "config",
    metavar="JSON",
    help="Hyper-parameters SOURCE lacks, or instead of its own: '{\"lr\": 0.01}'.",
)
@_ORDER
@_LOSSY
@JSON
def import_(
    source: Path,
    directory: str,
    *,
    source_format: Any,
    config: str | None,
    order: str | None,
    lossy: bool,
    as_json: bool,
) -> None:
    """Write another framework's SOURCE as a checkpoint in DIRECTORY."""
    settings = _settings(config)
    with errors_told():
        done = import_checkpoint(
            source,
            directory,
            source_format=source_format,
            config=settings,
            order=_names(order),
            lossy=lossy,
        )
        _tell(done, as_json)


def _tell(done: Converted, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"path": done.path, "notes": done.notes}))
        return
    for note in done.notes:
        click.echo(note, err=True)
    click.echo(done.path)


def _names(order: str | None) -> list[str] | None:
    return None if order is None else order.split(",")


def _settings(text: str | None) -> Mapping[str, Any]:
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise click.UsageError(f"--config: expected JSON, got {text!r}: {error}") from error
    if not isinstance(settings, dict):
        raise click.UsageError(f"--config: expected a JSON object, got {text!r}")
    return settings
