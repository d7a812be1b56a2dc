"""How the ranks of a script come to have one optimizer: rank 0 builds it under a name, the others
attach to that name. Imports no framework and no Ray.

Where Ray runs already (`RAY_ADDRESS`, an actor, a train function of Ray Train) the name is enough.
Else rank 0 starts a Ray, and leaves for the others of its host how they join it, in a file that
only their user can read, and that counts while rank 0 lives.
"""

import atexit
import dataclasses
import fcntl
import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Thread
from typing import IO, TypeVar

from distnadam.backends import factory
from distnadam.config import Options
from distnadam.errors import (
    ClusterError,
    ConfigError,
    DistNadamError,
    NotRunning,
    StepTimeout,
)
from distnadam.frontends.ranks import Place
from distnadam.optimizer import DistNadam
from distnadam.threads import start
from distnadam.waiting import said_if_long

_T = TypeVar("_T")
_POLL_S = 0.1
_LOOK_S = 0.02
_OTHERS_END_S = 60.0
"""Seconds that rank 0 waits at its end for the others to end too."""
_made = count()
_announced: dict[str, IO[str]] = {}  # which are locked as long as this process lives


def name_for(place: Place, name: str | None) -> str | None:
    """Return the name by which the ranks find each other; None where there is one rank and none is
    asked for. All ranks make their optimizers in the same order.

    Raises:
        ConfigError: nothing says what all ranks of this run call it.
    """
    if name is not None or place.num_workers == 1:
        return name
    if place.run is None:
        raise ConfigError(
            f"num_workers={place.num_workers!r} needs name: the ranks find each other by it"
        )
    return f"{place.run}-{next(_made)}"


def lasting(options: Options, *, is_named: bool) -> Options:
    """Return the options of what ranks make together. Under a name of ours it ends with rank 0's
    process, also one that is killed: the next start of the script has another name.
    """
    return options if is_named else dataclasses.replace(options, outlives=False)


def prepare(place: Place, options: Options) -> None:
    """Have a Ray, before rank 0 builds; other optimizers of this process are on it too."""
    if place.num_workers > 1:
        factory.keep_ray(options)


def announce(place: Place, name: str) -> None:
    """Say to the other ranks of this host how they join the Ray that has the optimizer."""
    if not place.is_one_host or place.run is None:
        return
    path = _directory() / name
    with _errors(path, "written"):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # which only this user can read
        file = open(descriptor, "w")  # noqa: SIM115  # for as long as this process says so
        try:
            json.dump(factory.how_to_join(), file)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            with suppress(OSError):
                file.close()
            raise
    _announced[name] = file


def withdraw(place: Place, name: str) -> None:
    """Remove what `announce` left."""
    if place.is_one_host and place.run is not None:
        with suppress(OSError, ClusterError):
            (_directory() / name).unlink()
        if (file := _announced.pop(name, None)) is not None:
            file.close()


def attach(place: Place, name: str, timeout_s: float) -> DistNadam:
    """Return the optimizer that rank 0 builds, once it is there.

    Raises:
        StepTimeout: it is not there in time.
        ClusterError: there is no way to rank 0's Ray.
    """
    if not factory.can_join():
        if not place.is_one_host or place.run is None:
            raise ClusterError(
                f"rank {place.rank} has no Ray to find {name!r} on: start one (ray start --head), "
                "and set RAY_ADDRESS to its address for all ranks"
            )
        path = _directory() / name
        os.environ.update(_await(lambda: _read(path), name, place, timeout_s))
    return _await(lambda: _running(name), name, place, timeout_s)


def close_at_end(place: Place, close: Callable[[], None], *, is_named: bool) -> None:
    """Have a rank leave at the end of its process, before Ray shuts itself down there, or of this
    thread, if its part ends with that, and nobody comes back to a name that a user has given.
    """
    atexit.register(close)
    if place.ends_with_thread and not is_named:
        whose = threading.current_thread()
        start(Thread(target=_close_after, args=(whose, close), name="distnadam-end", daemon=True))


def _close_after(thread: Thread, close: Callable[[], None]) -> None:
    thread.join()
    with suppress(DistNadamError):  # Ray has gone meanwhile
        close()


def others_have_left(optimizer: DistNadam, rank: int) -> bool:
    """Whether no other rank needs rank 0's shards: none is there, or one pushes on without it,
    which it does in vain.
    """
    try:
        now = optimizer.shards.describe()
    except DistNadamError:  # they are gone already
        return True
    present = set(now.newest) - {*now.left, *now.dead, rank}
    return rank > 0 or not present or bool(present - set(now.waiting_for))


def end(place: Place, name: str, optimizer: DistNadam) -> None:
    """End what rank 0 has made under a name, once no other rank needs it, or after a minute."""
    withdraw(place, name)
    deadline = time.monotonic() + _OTHERS_END_S
    while not others_have_left(optimizer, place.rank) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    with suppress(DistNadamError):  # it is gone already
        DistNadam.stop(name)


def running(name: str) -> DistNadam | None:
    """Return the optimizer of a name if it runs where this process can find it."""
    return _running(name) if factory.can_join() else None


def _running(name: str) -> DistNadam | None:
    try:
        return DistNadam.connect(name)
    except NotRunning:
        return None


def _await(look: Callable[[], _T | None], name: str, place: Place, timeout_s: float) -> _T:
    began = time.monotonic()
    with said_if_long(f"rank {place.rank}", lambda: f"for rank 0 to build {name!r}", timeout_s):
        while (found := look()) is None:
            if time.monotonic() - began > timeout_s:
                raise StepTimeout(
                    f"rank {place.rank}: rank 0 has not built {name!r} in {timeout_s:g} s, which "
                    "it does at its first step"
                )
            time.sleep(_POLL_S)
    return found


def _read(path: Path) -> dict[str, str] | None:
    """Return what a rank 0 that lives has announced; one that was killed may have left another."""
    with _errors(path, "read"), suppress(FileNotFoundError), path.open() as file:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        found: dict[str, str] = json.load(file)
        return found
    return None


def _directory() -> Path:
    """Return the directory of this user's announcements, which nobody else can write or read.

    Raises:
        ClusterError: somebody else has made it, or it cannot be made.
    """
    with _errors("the directory of temporary files", "found"):
        path = Path(tempfile.gettempdir()) / f"distnadam-{os.getuid()}"
    with _errors(path, "made"):
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ClusterError(f"{path} must be a directory that only this user can use")
    return path


@contextmanager
def _errors(what: object, action: str) -> Iterator[None]:
    """Raise an OSError of the body as a ClusterError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ClusterError(
            f"{what}: cannot be {action}: {error.strerror or error}; the ranks of this host meet "
            "there: set TMPDIR to a directory that can be written, or start a Ray (ray start "
            "--head) and set RAY_ADDRESS to its address for all ranks"
        ) from error
