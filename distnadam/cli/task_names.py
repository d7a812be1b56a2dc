"""Finds the task that a command line names."""

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import click

from distnadam.errors import ConfigError
from distnadam.training.task import Task
from distnadam.training.task_errors import missing_module, task_errors
from distnadam.training.tasks import BUILT_IN, built_in

_METHODS = ("init", "batch", "loss_and_gradients", "evaluate")


def load_task(name: str) -> Task:
    """Return the task that a command line names; raise UsageError if there is none."""
    if name in BUILT_IN:
        return built_in(name)
    module_name, _, attribute = name.rpartition(":")
    if not module_name:
        ways = f"{', '.join(BUILT_IN)}, MODULE:NAME or FILE.py:NAME"
        if Path(name).is_file():
            ways = f"{name}:NAME, where NAME is the task's class, or an object, in the file"
        raise click.UsageError(f"no task named {name!r}: give {ways}")
    found: Any = getattr(_module(module_name), attribute, None)
    if isinstance(found, type):
        _check_can_be_made(found, name, module_name)
    with task_errors(name):
        task = found() if isinstance(found, type) else found
    if not isinstance(task, Task):
        if found is None:
            raise click.UsageError(f"{name}: there is no {attribute!r} in {module_name}")
        missing = [each for each in _METHODS if not hasattr(task, each)]
        raise click.UsageError(
            f"{name}: expected a class or object with {', '.join(_METHODS)}; it has no "
            f"{', '.join(missing)}"
        )
    return task


def _check_can_be_made(found: type, name: str, module: str) -> None:
    """Raise UsageError unless a class has all its methods, and makes an object of no arguments."""
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise click.UsageError(f"{name}: has no {', '.join(missing)} yet: write them")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise click.UsageError(
            f"{name}: takes arguments ({error}): make an object in the file, "
            f"task = {found.__name__}(...), and give {module}:task"
        ) from error
    except ValueError:  # of what is not written in Python; its call will tell
        return


def _module(name: str) -> Any:
    """Import the module of a task by its name or path; raise UsageError if that fails."""
    if not name.endswith(".py"):
        directory, module = Path.cwd(), name
    else:
        path = Path(name).absolute()
        if not os.path.isfile(path):
            raise click.UsageError(f"{path}: there is no such file")
        directory, module = path.parent, path.stem
        if not module.isidentifier() or not _is_free(module, path):
            raise click.UsageError(
                f"{path}: workers import it by its name, and {module!r} cannot be one of yours: "
                "rename it"
            )
    # where the module's name leads to it; workers get its source (`training/task_code.py`)
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not _is_part(module, of=error.name or module):
            raise ConfigError(f"{name}: {missing_module(error)}") from error
        raise click.UsageError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _is_part(module: str, *, of: str) -> bool:
    return module == of or module.startswith(f"{of}.")


def _is_free(module: str, path: Path) -> bool:
    """Whether a file would be imported by its name, and not a package of that name."""
    if module in sys.stdlib_module_names or module == "__main__":
        return False
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    origin = None if spec is None else spec.origin
    return spec is None or (origin is not None and Path(origin).resolve() == path.resolve())
