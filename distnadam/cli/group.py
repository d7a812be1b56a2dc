"""What all commands share: their group, recurring options, the console, and exit codes."""

import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click
from rich.console import Console
from typing_extensions import override

from distnadam.errors import DistNadamError, RayLost

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


_COMMANDS = {
    "Training": ("train", "plot", "report", "plan", "doctor"),
    "A running optimizer": ("status", "save", "reshard", "stop"),
    "Hosts": ("drain", "uncordon", "notice"),
    "Checkpoints": ("inspect", "verify", "diff", "export", "import"),
}
"""The commands by purpose, as `--help` lists them; others are last."""


_LONGEST_HELP = 400
"""Of a command in the list: its first sentence, which is wrapped and never cut."""


def _order(name: str) -> int:
    """Return the place of a command in the help; those that are in no section are last."""
    names = [each for names in _COMMANDS.values() for each in names]
    return names.index(name) if name in names else len(names)


class Commands(click.Group):
    """The commands, on whatever standard output is: of any encoding, full, or closed."""

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = {name: title for title, names in _COMMANDS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in _COMMANDS}
        for name in sorted(self.list_commands(ctx), key=_order):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                row = (name, command.get_short_help_str(_LONGEST_HELP))
                rows.setdefault(listed.get(name, "Other"), []).append(row)
        for title, found in rows.items():
            with formatter.section(title):
                formatter.write_dl(found)

    @override
    def main(self, *args: Any, **extra: Any) -> Any:
        prepare_streams()
        # a program that calls the command with arguments goes on after it, and is not forked
        extra.setdefault("obj", (args[0] if args else extra.get("args")) is None)
        try:
            return super().main(*args, **extra)
        except SystemExit as end:
            if extra["obj"] and end.code == os.EX_TEMPFAIL:
                leave()
            raise
        except OSError as error:  # of a full disk behind standard output, above all
            with suppress(OSError):
                which = "" if error.filename is None else f"{error.filename}: "
                click.echo(
                    f"distnadam: {which}the system refused: {error.strerror or error}", err=True
                )
            _drop(sys.stdout)
            sys.exit(1)
        finally:
            try:
                sys.stderr.flush()
            except (OSError, ValueError, AttributeError):  # what nobody takes changes no status
                _drop(sys.stderr)


class Sectioned(click.Command):
    """A command whose help lists its options by purpose.

    Args:
        sections: names of options, by the title that they are under; others are under "Options".
        notes: rows of two words each, by the title that they are under, below all options.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Sequence[str]],
        notes: Mapping[str, Sequence[tuple[str, str]]],
        **others: Any,
    ) -> None:
        super().__init__(*args, **others)
        self._sections = sections
        self._notes = notes

    @override
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in self._sections}
        titles = {name: title for title, names in self._sections.items() for name in names}
        for option in self.get_params(ctx):
            row = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if row is not None:
                rows.setdefault(titles.get(str(option.name), "Options"), []).append(row)
        for title, listed in {**rows, **self._notes}.items():
            with formatter.section(title):
                formatter.write_dl(listed)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distnadam")
def main() -> None:
    """Train with a sharded Nadam parameter server, and look after its checkpoints."""


def plain_console(*, soft_wrap: bool = True) -> Console:
    """Return a console on standard output that prints brackets and colons as they are."""
    return Console(soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of this package as one line and exit with 1, or 75 if Ray itself died and the
    command can be given again; exit with 130 after Ctrl-C.
    """
    try:
        yield
    except DistNadamError as error:
        click.echo(f"distnadam: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            click.echo(note, err=True)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, RayLost) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def leave() -> NoReturn:
    """End this process, whose Ray died, with 75 at once: what would be done at exit waits for that
    Ray, which ends the process with 1 meanwhile.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(os.EX_TEMPFAIL)


def prepare_streams() -> None:
    """Have standard streams escape what their encoding lacks, and nothing else be opened in place
    of one that is closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop(stream: Any) -> None:
    """Let the interpreter end without trying again to write what could not be written."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def echo_json(data: Any) -> None:
    """Print data as one line of JSON, in which a number that is not finite is null."""
    click.echo(json.dumps(_finite(data), allow_nan=False, default=str))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
