"""The file run.toml in a run's directory: the command line of `train`, written and read again."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from typing_extensions import override

from distnadam.checkpoint.storage.base import os_errors_as
from distnadam.errors import ConfigError
from distnadam.plain_data import NOT_PARSED
from distnadam.training.callbacks import Callback

NAME = "run.toml"
_NOT_WRITTEN = frozenset(
    {"task", "checkpoint_dir", "resume", "verbose", "quiet", "as_json", "dry_run"}
)
"""What is of one call, not of the run: where it writes, above all, so that the file begins a new
one.
"""
_HEAD = "# What this run was made with. `distnadam train run.toml` makes a new one of it.\n"


def read(path: Path, context: click.Context) -> None:
    """Take the options of a file for those that the command line does not give, and its task.

    Raises:
        ConfigError: naming the file, and what in it cannot be.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except NOT_PARSED as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from error
    rows: dict[str, Any] = {}
    for key, value in found.items():  # tables are for the reader's eye
        rows |= value if isinstance(value, dict) else {key: value}
    task = rows.pop("task", None)
    if not isinstance(task, str):
        raise ConfigError(f'{path}: needs task = "...", as `distnadam train` takes it')
    file, colon, name = task.rpartition(":")
    if colon and file.endswith(".py"):
        task = f"{path.parent / file}:{name}"
    context.params["task"] = task
    options = _options(context.command)
    for key, value in rows.items():
        if key not in options:
            raise ConfigError(f"{path}: there is no option {key!r}; known are {', '.join(options)}")
        option = options[key]
        name = str(option.name)
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            continue  # the command line says otherwise
        try:
            context.params[name] = option.process_value(context, _given(value))
        except click.UsageError as error:
            raise ConfigError(f"{path}: {key} = {value!r}: {error.format_message()}") from error


def _given(value: Any) -> Any:
    """Return a value as a command line would give it."""
    if isinstance(value, list):
        return tuple(str(each) for each in value)
    return value if isinstance(value, bool) else str(value)


def _options(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command that a file may have, by their names there."""
    return {
        option.opts[0].removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in _NOT_WRITTEN
    }


class RunFile(Callback):
    """Writes the command line of `train` in the run's directory, once the run begins.

    Args:
        context: of the command.
        sections: names of options, by the title of their table.
    """

    def __init__(self, context: click.Context, sections: Mapping[str, Sequence[str]]) -> None:
        self._text = _text(context, sections)

    @override
    def on_begin(self, step: int, steps: int) -> None:
        path = self.run.directory / NAME
        with os_errors_as(path, "written"):
            path.write_text(self._text, encoding="utf-8")


def _text(context: click.Context, sections: Mapping[str, Sequence[str]]) -> str:
    task = str(context.params["task"])
    file, colon, name = task.rpartition(":")
    if colon and file.endswith(".py"):
        task = f"{Path(file).absolute()}:{name}"
    titles = {name: title for title, names in sections.items() for name in names}
    tables: dict[str, list[str]] = {title: [] for title in sections}
    for key, option in _options(context.command).items():
        value = context.params[str(option.name)]
        if value is None or value is False or value in ((), {}):
            continue  # not 0, which is not every option's default
        title = titles.get(str(option.name), next(iter(sections)))
        tables[title].append(f"{key} = {_toml(value)}")
    parts = [_HEAD + f"task = {_toml(task)}"]
    parts += [
        "\n".join([f"[{title.split(',')[0].lower()}]", *rows])
        for title, rows in tables.items()
        if rows
    ]
    return "\n\n".join(parts) + "\n"


def _toml(value: Any) -> str:
    """Return a value of an option as TOML writes it; JSON's strings and numbers are TOML's."""
    if isinstance(value, Mapping):
        return _toml([f"{key}={label}" for key, label in value.items()])
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
