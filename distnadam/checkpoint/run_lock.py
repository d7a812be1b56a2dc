"""A run's claim on its directory of checkpoints, so that no second run writes there: a lock where
it is local, a lease at a URL.

Object stores have no locks, but show at once what was written. Each run keeps a small file there
that it rewrites as long as it lives. Who finds another's watches it: one that changes is alive, one
that does not for a while is of a dead run, and is removed.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Self

from distnadam.checkpoint.storage.base import Directory
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.errors import CheckpointBusy, CheckpointError

log = logging.getLogger("distnadam")

LEASE_S = 20.0
"""How long a lease stays unchanged before its run counts as dead, in seconds."""
_PREFIX = ".run-"


class RunLock(ABC):
    """Keeps other runs out of a folder while it is entered."""

    def __init__(self, folder: Directory) -> None:
        self.folder = folder

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...

    @abstractmethod
    def check(self) -> None:
        """Raise CheckpointBusy where another run took the folder over meanwhile."""


def claim(folder: Directory) -> RunLock:
    """Return what claims a folder; entering it raises CheckpointBusy where another run writes
    there.
    """
    return DirectoryLock(folder) if isinstance(folder, LocalDirectory) else LeaseFile(folder)


class DirectoryLock(RunLock):
    """A lock on a file in a local folder: it ends with this process, and nobody takes it over
    before.
    """

    def __init__(self, folder: LocalDirectory) -> None:
        super().__init__(folder)
        self._path = folder.path / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"{self._path.parent}: cannot be made or written: {error.strerror or error}"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CheckpointBusy(
                f"{self._path.parent}: another run writes here (process {holder}); choose another "
                "directory"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return self

    def __exit__(self, *exc: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """See `RunLock.check`."""


class LeaseFile(RunLock):
    """A file at a URL that a thread rewrites.

    Of two runs that start at once the one whose file's name comes first stays. A run that did not
    rewrite its file for longer than the lease, stopped or cut off, may be taken over from, and is
    told so before its next save.
    """

    def __init__(self, folder: Directory, lease_s: float = LEASE_S) -> None:
        super().__init__(folder)
        self._lease_s = lease_s
        self._name = f"{_PREFIX}{os.urandom(8).hex()}"
        self._beats, self._lost, self._ended = 0, False, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.folder.make()
        try:
            self._outwait_others()
            self._rewrite("running")
        except BaseException:
            with suppress(CheckpointError):
                self.folder.remove(self._name)
            raise
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(CheckpointError):
            self.folder.remove(self._name)

    def check(self) -> None:
        """See `RunLock.check`."""
        if self._lost:
            raise CheckpointBusy(
                f"{self.folder}: another run took over while this one gave no sign of life; this "
                "one must stop"
            )

    def _outwait_others(self) -> None:
        seen: dict[str, tuple[bytes, float]] = {}
        while True:
            self._rewrite("starting")
            for name, said in self._others().items():
                if name not in seen:
                    log.warning(
                        "%s: holds another run's lease (%s); waiting to see whether that run lives",
                        self.folder,
                        _who(said),
                    )
                    seen[name] = (said, time.monotonic())
                elif said != seen[name][0]:
                    if name < self._name or not said.startswith(b"starting"):
                        raise CheckpointBusy(
                            f"{self.folder}: another run writes here ({_who(said)}); choose "
                            "another directory"
                        )
                    seen[name] = (said, time.monotonic())
                elif time.monotonic() - seen[name][1] > self._lease_s:
                    self.folder.remove(name)
            if not self._others():
                return
            time.sleep(self._lease_s / 8)

    def _others(self) -> dict[str, bytes]:
        found = {}
        for name in self.folder.files():
            if name.startswith(_PREFIX) and name != self._name:
                with suppress(CheckpointError):  # gone meanwhile
                    found[name] = self.folder.read(name, 1 << 10)
        return found

    def _keep(self) -> None:
        while not self._ended.wait(self._lease_s / 8):
            try:
                if self._name not in self.folder.files():
                    self._lost = True
                    return
                self._rewrite("running")
            except CheckpointError as error:
                log.warning("%s: the lease could not be renewed: %s", self.folder, error)

    def _rewrite(self, phase: str) -> None:
        self._beats += 1
        contents = f"{phase} {self._beats} process {os.getpid()} of {socket.gethostname()}".encode()
        self.folder.replace(self._name, contents, temporary=self._name)


def _who(said: bytes) -> str:
    return said.decode(errors="replace").split(" ", 2)[-1]
