"""How a run of `train` that did not come to its end goes on: where its checkpoints are, and the
command that resumes it.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import click
from typing_extensions import override

from distnadam.cli.group import leave
from distnadam.cli.restarting import saved
from distnadam.errors import RayLost
from distnadam.places import shown
from distnadam.training.callbacks import Callback

_NOT_REPEATED = ("resume", "verbose", "quiet", "as_json", "dry_run")
"""Options that the command to resume a run does not need."""


class Reached(Callback):
    """Knows where the checkpoints of a run are, once there is one.

    Args:
        given: the directory or URL that the command line names, if any.
    """

    def __init__(self, given: str | None) -> None:
        self._given = given
        self.directory: str | None = None

    @override
    def on_begin(self, step: int, steps: int) -> None:
        if step > 0:
            self.directory = self._given

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        self.directory = self._given or str(Path(path).parent)

    def saw(self, lost: RayLost) -> None:
        """Learn of a checkpoint that was complete, and not yet reported, when Ray died."""
        if lost.step >= 0:
            self.directory = self._given or lost.checkpoint_dir


@contextmanager
def how_to_resume(context: click.Context, reached: Reached) -> Iterator[None]:
    """Print the command that resumes a run which did not come to its end, if there is one."""
    try:
        yield
    except BaseException:
        _say(context, reached)
        raise


def end_alone(context: click.Context, reached: Reached, error: RayLost) -> NoReturn:
    """End this process, whose Ray died, with what is saved and the command that resumes the run."""
    with suppress(OSError):
        click.echo(f"distnadam: {saved(error)}", err=True)
    reached.saw(error)
    _say(context, reached)
    leave()


def _say(context: click.Context, reached: Reached) -> None:
    if reached.directory is not None:
        with suppress(OSError):
            command = _resume_command(context, reached.directory)
            click.echo(f"distnadam: to go on: {command}", err=True)


def _resume_command(context: click.Context, checkpoint_dir: object) -> str:
    """Return the command line that resumes a run, with every option that it was started with."""
    words = ["distnadam", "train", context.params["task"]]
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.name in _NOT_REPEATED:
            continue
        flag, value = option.opts[0], context.params[str(option.name)]
        if option.name == "checkpoint_dir":
            value = checkpoint_dir
        if option.is_flag:
            words += [flag] if value else []
        elif isinstance(value, dict):
            for key, label in value.items():
                words += [flag, f"{key}={label}"]
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        elif value is not None and not (flag.endswith(("-cpus", "-gpus")) and value == 0):
            words += [flag, shown(str(value))]
    return shlex.join(words)
