"""The lock of a run on its checkpoint directory, so that no second run writes there.

A local directory is locked by `flock`, which ends with its process. Object stores have no locks,
but show a write to every reader at once: there each run keeps a small lease file that it rewrites
as long as it lives. A run that finds another's lease file watches it: one that changes belongs to a
live run, one that stays unchanged for `LEASE_S` to a dead run, and is removed.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Self

from typing_extensions import override

from distnadam.checkpoint.storage.base import Directory, os_errors_as
from distnadam.checkpoint.storage.local import LocalDirectory, is_open_at, lock
from distnadam.errors import CheckpointBusy, CheckpointError
from distnadam.threads import start

log = logging.getLogger("distnadam")

LEASE_S = 20.0
"""Seconds a lease file stays unchanged before its run counts as dead."""
_LOCK = ".lock"
_LOOKED_AT_S = (0.01, 0.1)
"""Waits before a lock counts as another run's: `is_held` holds it, too, for a moment."""
_PREFIX = ".run-"
_STARTING, _RUNNING = "starting", "running"


class RunLock(ABC):
    """A context manager that keeps other runs out of a directory.

    Entering raises CheckpointBusy if another run writes there.
    """

    def __init__(self, directory: Directory) -> None:
        self.directory = directory

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...

    @abstractmethod
    def check(self) -> None:
        """Raise CheckpointBusy if another run has taken the directory over meanwhile."""


def make_run_lock(directory: Directory) -> RunLock:
    """Return the lock for a directory's kind of storage, not yet entered."""
    if isinstance(directory, LocalDirectory):
        return DirectoryLock(directory)
    return LeaseFile(directory)


def is_held(directory: Path) -> bool | None:
    """Whether a run writes to a local directory; None if nothing there tells.

    The lock of a run of another host is seen where both hosts' file system says so.
    """
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return False


class DirectoryLock(RunLock):
    """A `flock` on a file in a local directory, which ends with this process.

    It is lost with the file: if somebody removes or moves that or the directory, `check` locks the
    place anew, unless another run has meanwhile.
    """

    def __init__(self, directory: LocalDirectory) -> None:
        super().__init__(directory)
        self._path = directory.path / _LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        root = self._path.parent
        with os_errors_as(root, "made or written"):
            root.mkdir(parents=True, exist_ok=True)
        with os_errors_as(self._path, "written"):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not self._lock(descriptor):
                    holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                    raise CheckpointBusy(
                        f"{root}: another run writes here (process {holder}); choose another "
                        "directory"
                    )
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        return self

    def _lock(self, descriptor: int) -> bool:
        for seconds in _LOOKED_AT_S:
            if lock(descriptor, self._path.parent):
                return True
            time.sleep(seconds)
        return lock(descriptor, self._path.parent)

    def __exit__(self, *exc: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @override
    def check(self) -> None:
        if self._descriptor is not None and is_open_at(self._path, self._descriptor):
            return
        log.warning(
            "%s: was removed or moved while this run writes there: it goes on, without what was "
            "there before",
            self._path,
        )
        self.__exit__()
        self.__enter__()


class LeaseFile(RunLock):
    """A file in a remote directory that a thread rewrites, as a heartbeat.

    Of two runs that start at once, the one whose file name sorts first stays. A run that does not
    rewrite its file for longer than the lease, because it is stopped or cut off, may be taken over
    from; `check` raises CheckpointBusy in it from then on.

    Args:
        directory: the directory to lock.
        lease_s: seconds a file stays unchanged before its run counts as dead.
    """

    def __init__(self, directory: Directory, lease_s: float = LEASE_S) -> None:
        super().__init__(directory)
        self._lease_s = lease_s
        self._name = f"{_PREFIX}{os.urandom(8).hex()}"
        self._heartbeat = 0
        self._lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.directory.make()
        try:
            self._wait_for_other_runs()
            self._write(_RUNNING)
        except BaseException:
            with suppress(CheckpointError):
                self.directory.remove(self._name)
            raise
        start(self._thread)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop_renewing()
        with suppress(CheckpointError):
            self.directory.remove(self._name)

    @override
    def check(self) -> None:
        if self._lost:
            raise CheckpointBusy(
                f"{self.directory}: another run took over while this one gave no sign of life; "
                "this one must stop"
            )

    def renew(self) -> None:
        """Write the next heartbeat; mark the lease lost if another run has removed the file."""
        if self._name not in self.directory.files():
            self._lost = True
            return
        self._write(_RUNNING)

    def stop_renewing(self) -> None:
        """End the heartbeat and leave the file, as the death of the process does."""
        self._stopped.set()
        self._thread.join()

    def _keep_renewing(self) -> None:
        while not self._lost and not self._stopped.wait(self._lease_s / 8):
            try:
                self.renew()
            except CheckpointError as error:
                log.warning("%s: the lease could not be renewed: %s", self.directory, error)

    def _wait_for_other_runs(self) -> None:
        """Return once no other run's file is left; raise CheckpointBusy if one of them lives."""
        seen: dict[str, tuple[bytes, float]] = {}
        while True:
            self._write(_STARTING)
            for name, contents in self._other_leases().items():
                if name not in seen:
                    log.warning(
                        "%s: holds another run's lease (%s); waiting to see whether that run lives",
                        self.directory,
                        _owner(contents),
                    )
                    seen[name] = (contents, time.monotonic())
                elif contents != seen[name][0]:
                    if name < self._name or not contents.startswith(_STARTING.encode()):
                        raise CheckpointBusy(
                            f"{self.directory}: another run writes here ({_owner(contents)}); "
                            "choose another directory"
                        )
                    seen[name] = (contents, time.monotonic())
                elif time.monotonic() - seen[name][1] > self._lease_s:
                    self.directory.remove(name)
            if not self._other_leases():
                return
            time.sleep(self._lease_s / 8)

    def _other_leases(self) -> dict[str, bytes]:
        """Return the contents of the other runs' lease files, by name."""
        found = {}
        for name in self.directory.files():
            if name.startswith(_PREFIX) and name != self._name:
                with suppress(CheckpointError):  # removed since it was listed
                    found[name] = self.directory.read(name, 1 << 10)
        return found

    def _write(self, phase: str) -> None:
        self._heartbeat += 1
        owner = f"process {os.getpid()} of {socket.gethostname()}"
        contents = f"{phase} {self._heartbeat} {owner}".encode()
        self.directory.replace(self._name, contents, temporary=self._name)


def _owner(contents: bytes) -> str:
    """Return "process N of HOST" of a lease file's contents."""
    return contents.decode(errors="replace").split(" ", 2)[-1]
