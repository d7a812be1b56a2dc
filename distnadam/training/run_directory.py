"""The local directory of a run, for metrics.csv, the plot, and checkpoints unless they go to a URL.

It is the one that was named, or a new one; a run that is resumed from a URL goes on in the one that
it had in this working directory.
"""

import re
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from distnadam.checkpoint import store
from distnadam.checkpoint.storage.base import Directory, os_errors_as
from distnadam.errors import CheckpointError
from distnadam.places import place

_MOST_CHARACTERS = 100
"""Of a label, in the name of a directory."""
_MARK = "checkpoints.url"
"""The file that says at which URL the checkpoints of the run are."""


def claim_run_directory(label: str) -> Path:
    """Make the default directory of a new run, ``runs/<label>-<time>``, and return its path.

    It is no other run's: of runs that begin in the same second, all but one get a number.

    Raises:
        CheckpointError: it cannot be made.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", label)[:_MOST_CHARACTERS]
    first = place(f"runs/{safe}-{time.strftime('%Y%m%d-%H%M%S')}", "the run's directory")
    for number in count(1):
        path = Path(first if number == 1 else f"{first}-{number}")
        with os_errors_as(path, "made"), suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
    raise AssertionError("unreachable")


def directory_beside(checkpoints: Directory, label: str, *, resumes: bool) -> tuple[Path, str]:
    """Return the local directory of a run whose checkpoints are at a URL, and a sentence on it.

    Args:
        checkpoints: the URL's.
        label: the task's name.
        resumes: whether the run may go on from a checkpoint there.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    is_resumed = resumes and _holds_checkpoints(checkpoints)
    if is_resumed and (before := _had(str(checkpoints))) is not None:
        return before, f"metrics.csv and loss.png go on in {before}"
    path = claim_run_directory(label)
    with os_errors_as(path / _MARK, "written"):
        (path / _MARK).write_text(str(checkpoints), encoding="utf-8")
    rest = ", without the steps before: their rows are where the run was" if is_resumed else ""
    return path, f"metrics.csv and loss.png are in {path}{rest}"


def _holds_checkpoints(directory: Directory) -> bool:
    with suppress(CheckpointError):  # said where the run looks for them
        return bool(store.step_directories(directory))
    return False


def _had(url: str) -> Path | None:
    """Return the newest local directory of a run with checkpoints at a URL, if there is one."""
    found: list[tuple[int, Path]] = []
    for mark in Path(place("runs", "the run's directory")).glob(f"*/{_MARK}"):
        with suppress(OSError, ValueError):
            if mark.read_text(encoding="utf-8") == url:
                found.append((mark.stat().st_mtime_ns, mark.parent))
    return max(found)[1] if found else None
