"""The commands on checkpoints: `inspect` one, `diff` two, `verify` all."""

import sys
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from distnadam.checkpoint import store
from distnadam.checkpoint.diff import CheckpointDiff, compare
from distnadam.checkpoint.inspect import REFUSED, UNREAD, VERIFIED, describe
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.cli.group import JSON, echo_json, exit_on_error, main, plain_console
from distnadam.errors import CheckpointError
from distnadam.groups import in_words


@main.command()
@click.argument("checkpoint")
@click.option(
    "--no-read",
    is_flag=True,
    help="Do not read the shards' files: their checksums stay unverified.",
)
@JSON
def inspect(checkpoint: str, *, no_read: bool, as_json: bool) -> None:
    """Show what CHECKPOINT, or the newest valid one in a directory, holds.

    Exit with 1 if a checksum is wrong.
    """
    with exit_on_error():
        path, manifest, passed_over = store.find(checkpoint)
        found = describe(path, manifest, read=not no_read)
    for sentence in passed_over:
        click.echo(f"passed over: {sentence}", err=True)
    if as_json:
        echo_json(found)
    else:
        _show(found)
    if found["checksums"] == REFUSED:
        sys.exit(1)


@main.command()
@click.argument("a")
@click.argument("b")
@JSON
def diff(a: str, b: str, *, as_json: bool) -> None:
    """Show what differs between checkpoints A and B, however they are sharded.

    Exit with 1 if anything does.
    """
    with exit_on_error():
        found = compare(a, b)
    if as_json:
        echo_json(found.to_dict())
    elif found.same:
        click.echo("the same: settings, clock, and every bit of the tensors")
    else:
        _show_difference(found)
    if not found.same:
        sys.exit(1)


@main.command()
@click.argument("path")
@JSON
def verify(path: str, *, as_json: bool) -> None:
    """Verify every byte of a checkpoint, or of all in a directory.

    Exit with 1 if one is refused.
    """
    verdicts = []
    with exit_on_error():
        root = open_directory(path)
        steps = [] if store.MANIFEST in root.files() else store.step_directories(root)
    for directory in steps or [root]:
        try:
            manifest = store.verify(directory)
            verdicts.append(
                {
                    "checkpoint": str(directory),
                    "valid": True,
                    "step": manifest.iterations,
                    "reason": None,
                }
            )
        except CheckpointError as error:
            verdicts.append(
                {"checkpoint": str(directory), "valid": False, "step": None, "reason": str(error)}
            )
    if as_json:
        echo_json(verdicts)
    else:
        table = Table("checkpoint", "step", "verdict")
        for v in verdicts:
            table.add_row(
                str(v["checkpoint"]).rpartition("/")[2],
                str(v["step"] or "-"),
                Text("valid" if v["valid"] else str(v["reason"])),
            )
        plain_console().print(table)
    if not all(v["valid"] for v in verdicts):
        sys.exit(1)


def _show(found: dict[str, Any]) -> None:
    console = plain_console()
    console.print(found["path"])
    for table in (_facts(found), _tensors(found), _files(found)):
        console.print(table)
    for file in found["files"]:
        if _is_refused(file):
            click.echo(f"problem: {file['checksums']}", err=True)


def _facts(found: dict[str, Any]) -> Table:
    table, sizes = Table(show_header=False), found["sizes"]
    for name in ("iterations", "m_schedule", "round", "skipped"):
        table.add_row(name, str(found[name]))
    for part in ("config", "topology", "run", "data"):
        for name, value in found[part].items():
            if (part, name) != ("config", "groups"):
                table.add_row(f"{part}.{name}", Text(_said(value)))
    for group in found["config"]["groups"]:
        table.add_row("config.groups", Text(in_words(group)))
    table.add_row("elements", str(sizes["elements"]))
    table.add_row(
        "bytes",
        f"{sizes['state_bytes']} of state, {sizes['file_bytes']} in files, "
        f"{sizes['manifest_bytes']} of manifest",
    )
    table.add_row("checksums", found["checksums"])
    return table


def _tensors(found: dict[str, Any]) -> Table:
    """Return a row for each tensor, with its group and its clock where there are several."""
    in_groups = bool(found["config"]["groups"])
    differ = any(t["steps"] != found["iterations"] for t in found["tensors"])
    headings = ["tensor", "shape", "dtype", "elements", *(["group"] if in_groups else [])]
    headings += ["steps"] if differ else []
    table = Table(*headings, title="tensors")
    for t in found["tensors"]:
        table.add_row(
            Text(t["path"]),
            str(tuple(t["shape"])),
            t["dtype"],
            f"{t['space']}[{t['begin']}:{t['end']}]",
            *([Text(t["group"] or "")] if in_groups else []),
            *([str(t["steps"])] if differ else []),
        )
    return table


def _files(found: dict[str, Any]) -> Table:
    table = Table("shard", "bytes", "ranges", "chunks", title="shards")
    for index, f in enumerate(found["files"]):
        ranges = ", ".join(f"{space}[{begin}:{end}]" for space, (begin, end) in f["ranges"].items())
        table.add_row(
            str(index),
            str(f["bytes"]),
            Text(ranges),
            "refused" if _is_refused(f) else f"{f['chunks']} {f['checksums']}",
        )
    return table


def _is_refused(file: dict[str, Any]) -> bool:
    return file["checksums"] not in (VERIFIED, UNREAD)


def _said(value: Any) -> str:
    """Return a setting's value in words: a text without quotes, a group or schedule as written."""
    value = _without_elements(value)
    return value if isinstance(value, str) else in_words(value)


def _without_elements(value: Any) -> Any:
    """Return plain data with each array's type and shape in its place."""
    match value:
        case {"$array": [str(kind), list(shape), _]}:
            return f"{kind.lstrip('<|=')} {tuple(shape)}"
        case dict():
            return {key: _without_elements(each) for key, each in value.items()}
        case list():
            return [_without_elements(each) for each in value]
        case _:
            return value


def _show_difference(found: CheckpointDiff) -> None:
    console = plain_console()
    for name, (first, second) in found.settings.items():
        console.print(f"{name}: {_said(first)} in the first, {_said(second)} in the second")
    for sentence in found.structure:
        console.print(sentence)
    for d in found.tensors:
        largest = "not finite" if d.max_abs is None else f"{d.max_abs:.6g}"
        console.print(
            f"{d.path}: {d.array}: {d.count} of {d.elements} differ, max abs {largest}, max ulp "
            f"{d.max_ulp}, first index {d.first_index}: {d.first[0]!r} in the first, "
            f"{d.first[1]!r} in the second"
        )
