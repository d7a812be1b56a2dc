"""The Ray that this process has joined: whether it may be called, and whether it still runs.

When the raylet of this host dies, Ray reports that actors died; when its head dies, it is silent
for a minute and then ends the processes that had joined it. So both are looked at here, by their
sockets: before calls, while one waits, and where one has failed.
"""

import logging
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from distnadam.errors import DistNadamError, LifecycleError, RayLost
from distnadam.threads import renew_after_fork

log = logging.getLogger("distnadam")

LOOK_EVERY_S = 1.0
"""Seconds between two looks at a Ray that seems to run."""
_RAYLET_EVERY_S = 0.01
"""Seconds between two looks at a raylet that seems to run, which cost a step its share."""
_ANSWER_S = 1.0
_PAUSE_S = 0.1
_RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""The seconds after which Ray ends a process that cannot reach its head."""
_RAYS_PATIENCE_S = 60.0
_AWAITED = 1 / 2
"""The part of these for which a head is waited for that does not answer."""
_NOTICED = 1 / 6
"""The part of these in which whoever calls Ray may notice then that it died."""
_PROCESSES = ("gcs_server", "raylet")
"""Without which there is no Ray."""


class JoinedRay:
    """A Ray that runs, as this process sees it.

    Args:
        owned: whether this process has started it, so that nobody else will start its head again.
    """

    def __init__(self, *, owned: bool) -> None:
        context = ray.get_runtime_context()
        self._owned = owned
        self._head = context.gcs_address
        self._patience_s = _rays_patience_s() * _AWAITED
        self._raylet, self._pid = _watch_raylet(context.get_node_id())
        self._look_at = self._raylet_at = 0.0
        self._silent_since: float | None = None
        self.end: str | None = None
        self.id = (self._head, context.get_job_id())

    def look(self, *, now: bool) -> None:
        """Set `end` to how it died, if it has; without `now` look once in a while."""
        moment = time.monotonic()
        if self.end is not None or (moment < self._raylet_at and not now):
            return
        self._raylet_at = moment + _RAYLET_EVERY_S
        if self._raylet is not None and _is_readable(self._raylet):
            self.end = f"its raylet on this host (process {self._pid}) ended"
            return
        if moment < self._look_at and not now:
            return
        self._look_at = moment + LOOK_EVERY_S
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        except OSError as error:
            self._miss_head(error)
        else:
            self._silent_since = None

    def await_head(self) -> None:
        """Wait for a head that does not answer, since a call of Ray's that needs it would hang."""
        self.look(now=True)
        if self.end is None and self._silent_since is not None:
            log.warning("Ray's head at %s does not answer: waiting for it", self._head)
        while self.end is None and self._silent_since is not None:
            time.sleep(_PAUSE_S)
            self.look(now=True)

    def close(self) -> None:
        """Look no more."""
        if self._raylet is not None:
            os.close(self._raylet)
            self._raylet = None

    def _miss_head(self, error: OSError) -> None:
        """Wait for the head of others, which may come back, half as long as Ray does."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        if self._owned and isinstance(error, ConnectionRefusedError):
            self.end = f"its head at {self._head} ended"
        elif now - self._silent_since >= self._patience_s:
            self.end = f"its head at {self._head} has not answered for {self._patience_s:g} s"


def _rays_patience_s() -> float:
    return float(os.environ.get(_RAYS_PATIENCE, _RAYS_PATIENCE_S))


def notice_s() -> float:
    """Return for how long, once Ray has died, a call that hangs may go on before Ray ends this
    process.
    """
    return _rays_patience_s() * _NOTICED


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _watch_raylet(node: str) -> tuple[int | None, int]:
    """Return a descriptor that is readable once this node's raylet has ended, and its process id.

    The descriptor is None where the raylet is of another container, or there are no descriptors.
    """
    sockets = {entry["NodeID"]: entry["RayletSocketName"] for entry in ray.nodes()}
    with suppress(OSError), socket.socket(socket.AF_UNIX) as raylet:
        raylet.connect(sockets.get(node, ""))
        peer = raylet.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", peer)[0]
        if pid:
            return os.pidfd_open(pid), pid
    return None, 0


def why_lost_while_starting() -> str | None:
    """Return which process of a Ray that this process starts was killed; None if none was.

    Ray itself waits for it for a minute, and then fails or ends this process.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            pid, rest = stat.read_text().split(" (", 1)
            name, fields = rest.rsplit(") ", 1)
            state, parent, *others = fields.split()
            is_ours = int(parent) == os.getpid() and name in _PROCESSES
            if is_ours and state == "Z" and int(others[-1]) == signal.SIGKILL:
                return f"its {name} (process {pid}) was killed while it started"
    return None


class _ThisProcess:
    """How this process stands to Ray."""

    def __init__(self) -> None:
        self.joined: JoinedRay | None = None
        self.is_forked = False  # from one that had joined Ray, whose threads it lacks

    def after_fork(self) -> None:
        """Remember it, as Ray itself does not."""
        self.is_forked = self.is_forked or ray.is_initialized()


_process = _ThisProcess()
renew_after_fork(_process)


def watch_joined(*, owned: bool) -> None:
    """Look from now on at the Ray that this process is on, if it does not yet."""
    if _process.is_forked:
        return
    context, before = ray.get_runtime_context(), _process.joined
    if before is not None:
        if before.id == (context.gcs_address, context.get_job_id()):
            return
        before.close()
    _process.joined = JoinedRay(owned=owned)


def why_lost(*, now: bool = True) -> str | None:
    """Return how the Ray of this process died; None if it runs, or nobody looks at it.

    Args:
        now: look, also if the last look was a moment ago.
    """
    joined = _process.joined
    if joined is None:
        return None
    if ray.is_initialized():
        joined.look(now=now)
    return joined.end


def why_failed() -> str | None:
    """As `why_lost`, where a call of Ray's has failed: wait first for a head that does not answer,
    which may be why.
    """
    joined = _process.joined
    if joined is not None and ray.is_initialized() and not _process.is_forked:
        joined.await_head()
    return why_lost()


def is_forked() -> bool:
    """Whether this process was forked from one that had joined Ray."""
    return _process.is_forked


def has_ray() -> bool:
    """Whether this process can call Ray: it has joined one that lives, and is no forked child of
    the process that did.
    """
    return not _process.is_forked and ray.is_initialized() and why_lost(now=False) is None


def require_ray() -> None:
    """Raise LifecycleError if Ray was shut down, whose functions would start or join another one;
    or if this is a forked child, in which they would wait for ever.

    Raises:
        RayLost: Ray itself died.
    """
    if _process.is_forked:
        raise LifecycleError(
            "this process was forked from one that had joined Ray, and cannot use its connection: "
            "start it by spawn (multiprocessing.get_context('spawn')), or connect(name) from a new "
            "process"
        )
    joined, is_on = _process.joined, ray.is_initialized()
    if joined is not None:
        if is_on:
            joined.look(now=False)
        if joined.end is not None:
            raise ray_lost(joined.end)
    if not is_on:
        raise LifecycleError("the Ray that this optimizer ran on was shut down in this process")


def ray_lost(end: str) -> RayLost:
    """Return the error for a Ray that died."""
    return RayLost(f"Ray itself died: {end}, and all that ran on it is gone")


@contextmanager
def while_ray_lives() -> Iterator[None]:
    """Raise RayLost in place of whatever fails in the body because Ray itself died; else as
    `require_ray`. Wait first for a head that does not answer.
    """
    if not _process.is_forked and _process.joined is not None and ray.is_initialized():
        _process.joined.await_head()
    require_ray()
    try:
        yield
    except Exception as error:
        look = why_lost if isinstance(error, DistNadamError) else why_failed
        if not isinstance(error, RayLost) and (end := look()) is not None:
            raise ray_lost(end) from error
        raise
