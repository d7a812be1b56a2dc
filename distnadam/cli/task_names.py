"""Finds the task that a command line names."""

import importlib.util
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
        raise click.UsageError(
            f"no task named {name!r}: give {', '.join(BUILT_IN)}, MODULE:NAME or FILE.py:NAME"
        )
    found: Any = getattr(_module(module_name), attribute, None)
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
