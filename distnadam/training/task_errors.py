"""Errors of a task's own code, as this package raises them: where, what, and what to do."""

import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distnadam.errors import ConfigError, DistNadamError, TrainingError

_INSTALLED = frozenset({"site-packages", "dist-packages"})


@contextmanager
def task_errors(location: str) -> Iterator[None]:
    """Raise what the task's code raises as `error_of_task` has it, beginning with `location`.

    Errors of this package pass unchanged.
    """
    try:
        yield
    except DistNadamError:
        raise
    except Exception as error:
        raise error_of_task(location, error) from error


def error_of_task(location: str, error: Exception) -> DistNadamError:
    """Return the error for one that the task's code raised.

    It is a TrainingError with the traceback in a note; for a module that is not there a
    ConfigError, since nothing is mended by trying again.
    """
    if isinstance(error, ModuleNotFoundError) and error.name:
        return ConfigError(f"{location}: the task {missing_module(error)}")
    wrapped = TrainingError(
        f"{location}: the task raised {type(error).__name__}: {error}{_place_of(error)}"
    )
    # a note, as the cause is lost on the way from another process
    wrapped.add_note(traceback.format_exc())
    return wrapped


def _place_of(error: Exception) -> str:
    """Return the file and line of the innermost code that is not installed."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is who called the task
    own = [each for each in frames if _INSTALLED.isdisjoint(Path(each.filename).parts)] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def missing_module(error: ModuleNotFoundError) -> str:
    """Return which module is needed, where it is not, and the remedy.

    >>> missing_module(ModuleNotFoundError(name="gone"))
    "needs the module 'gone', which ..."
    """
    return (
        f"needs the module {error.name!r}, which {sys.executable} on {socket.gethostname()} does "
        "not have: install the package that has it, on every host; a module of yours belongs "
        "beside the task's file"
    )
