"""Connecting to a Ray that runs already, or starting our own.

A Ray that cannot be joined is refused in one sentence and within seconds: Ray itself tries for
minutes, and may end the process.
"""

import atexit
import contextlib
import logging
import os
import resource
import secrets
import shlex
import socket
import sys
import tempfile
import threading
import time
from typing import Any

import ray
from ray._private import worker as ray_worker

from distnadam.backends.ray.joined import (
    is_forked,
    ray_lost,
    require_ray,
    watch_joined,
    why_lost_while_starting,
)
from distnadam.backends.ray.output import drain_output, show_output
from distnadam.config import Options
from distnadam.errors import ClusterError, InsufficientResources, NotRunning
from distnadam.threads import start as start_thread

log = logging.getLogger("distnadam")

_ANSWER_S = 5.0
_PAUSE_S = 0.05
_SHUT_DOWN_S = 30.0
"""Seconds after which a head is killed that keeps its Ray from being shut down."""
_LONGEST_TMPDIR = 40
"""Characters of a folder for temporary files in which the name of a Unix socket of Ray's fits."""
_NAMESPACE = "distnadam-driver"
_TOKEN_OF_RAY = os.path.expanduser("~/.ray/auth_token")
"""Where Ray keeps a token that nothing else names."""
_SHARED_MEMORY = "/dev/shm"
_ALLOWS_DISK = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class OwnedRay:
    """A Ray that this process started, behind a token that only it and its children know."""

    def __init__(self, options: Options | None) -> None:
        self._token_file: str | None = None
        if options is not None and options.object_store_bytes is not None:
            _require_room(options.object_store_bytes)
        if not os.environ.keys() & set(_TOKEN_VARIABLES):
            # Ray would make a token by itself, but write it to the home directory
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.ERROR,
                object_store_memory=options.object_store_bytes if options is not None else None,
                namespace=_NAMESPACE,
            )
        except Exception as error:  # the system's refusals come as many classes
            killed = why_lost_while_starting()
            with contextlib.suppress(Exception):
                shut_down_ray()  # what it had started
            if killed is not None:
                raise ray_lost(killed) from error
            raise ClusterError(
                f"Ray cannot be started here: {_first_line(error)}{_remedy()}; or use "
                "backend='local', which needs no Ray"
            ) from error
        watch_joined(owned=True)
        show_output()
        if "RAY_AUTH_MODE" not in os.environ:  # Ray before 2.59 that was imported before us
            log.warning(
                "whoever reaches the Ray started here may run code on it: set RAY_AUTH_MODE=token"
            )

    def how_to_reach(self, name: str) -> str:
        """Return how another shell of this user reaches an optimizer on this Ray."""
        address = ray.get_runtime_context().gcs_address
        mode = os.environ.get("RAY_AUTH_MODE", "disabled")
        words = [f"RAY_AUTH_MODE={mode}"]
        where = ""
        if mode == "token":
            path = os.environ.get("RAY_AUTH_TOKEN_PATH", _TOKEN_OF_RAY)
            if (token := os.environ.get("RAY_AUTH_TOKEN")) is not None:
                path = self._keep_token(token)
            words.append(f"RAY_AUTH_TOKEN_PATH={shlex.quote(path)}")
            where = f", whose token is in {path}"
        command = f"distnadam status {shlex.quote(name)} --address {address}"
        return (
            f"{name}: runs on the Ray that this process started, at {address}{where}; from another "
            f"shell: {' '.join(words)} {command} (or save, reshard, stop in place of status)"
        )

    def _keep_token(self, token: str) -> str:
        """Write the token where only this user can read it, and return the path."""
        if self._token_file is None:
            directory = ray_worker.global_worker.node.get_session_dir_path()
            descriptor, self._token_file = tempfile.mkstemp(prefix="token-", dir=directory)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(token)
        return self._token_file

    def shut_down(self) -> None:
        """Stop every process of this Ray; the environment keeps the token, which Ray has cached."""
        if not is_forked():
            drain_output()
            shut_down_ray()
        if self._token_file is not None:
            with contextlib.suppress(OSError):
                os.remove(self._token_file)


def keep_ray(options: Options) -> None:
    """Have a Ray in this process that does not end with the optimizer that starts it, but with the
    process.
    """
    owned = connect_or_start(options)
    if owned is not None:
        atexit.register(owned.shut_down)


def how_to_join() -> dict[str, str]:
    """Return the variables with which another process of this user joins the Ray of this one."""
    variables = {name: os.environ[name] for name in _TOKEN_VARIABLES if name in os.environ}
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, **variables}


def shut_down_ray() -> None:
    """Shut down the Ray that this process started, also where its head does not answer any more.

    Ray asks its head for something, with no limit of time, in a call that no signal ends.
    """
    node = ray_worker._global_node
    if node is None:
        ray.shutdown()
        return
    killer = threading.Timer(_SHUT_DOWN_S, _kill_head, [node])
    killer.daemon = True
    with contextlib.suppress(RuntimeError):  # the system has no thread
        start_thread(killer)
    try:
        ray.shutdown()
    finally:
        killer.cancel()


def _kill_head(node: Any) -> None:
    with contextlib.suppress(Exception):  # it has ended
        node.kill_gcs_server(check_alive=False)


def connect_or_start(options: Options | None, *, start: bool = True) -> OwnedRay | None:
    """Connect to the Ray of this process or of `RAY_ADDRESS`; else start and return our own.

    Args:
        options: settings of a Ray that is started.
        start: whether to start one.

    Raises:
        NotRunning: there is none, and `start` is False.
        ClusterError: the Ray at `RAY_ADDRESS` does not answer, or refuses.
        RayLost: the Ray that this process had joined died.
    """
    if ray.is_initialized():
        watch_joined(owned=False)
        require_ray()
        return None
    address = os.environ.get("RAY_ADDRESS")
    if not address and not start:
        raise NotRunning(
            "no Ray runs in this process and RAY_ADDRESS is not set: there is nothing to connect "
            "to; give the head's HOST:PORT"
        )
    if not address:
        return OwnedRay(options)
    _require_listener(address)
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    try:
        ray.init(address=address, log_to_driver=start, namespace=_NAMESPACE)
        if start:
            show_output()
    except ConnectionError as error:  # which is all that Ray says to a wrong token
        raise ClusterError(
            f"cannot join the Ray at RAY_ADDRESS={address}, which answers but refuses: "
            f"RAY_AUTH_MODE is {mode} here; give it, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as "
            "the cluster's hosts have them"
        ) from error
    except Exception as error:
        raise ClusterError(
            f"cannot join the Ray at RAY_ADDRESS={address} (RAY_AUTH_MODE is {mode}): "
            f"{_first_line(error)}"
        ) from error
    watch_joined(owned=False)
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _require_room(store_bytes: int) -> None:
    """Raise InsufficientResources if an object store does not fit in /dev/shm: Ray would have it on
    the disk.
    """
    with contextlib.suppress(OSError):
        room = os.statvfs(_SHARED_MEMORY)
        free = room.f_bavail * room.f_frsize
        if store_bytes > free and _ALLOWS_DISK not in os.environ:
            raise InsufficientResources(
                f"object_store_bytes={store_bytes}: {_SHARED_MEMORY} has {free} bytes free; ask "
                f"for less, make it larger (docker run --shm-size), or set {_ALLOWS_DISK}=1 to "
                "have the store on the disk"
            )


def _remedy() -> str:
    """Return what in this process's surroundings is known to keep Ray from starting."""
    found = []
    if len(tempfile.gettempdir()) > _LONGEST_TMPDIR:
        found.append(
            f"TMPDIR={tempfile.gettempdir()} is too long for the sockets that Ray makes in it, set "
            f"RAY_TMPDIR to a path of at most {_LONGEST_TMPDIR} characters"
        )
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        found.append("the address space is limited (ulimit -v), and Ray reserves more")
    if sys.flags.optimize > 1:
        found.append("PYTHONOPTIMIZE=2 takes away the docstrings that Ray reads")
    return "".join(f"; {sentence}" for sentence in found)


def _require_listener(address: str) -> None:
    """Raise ClusterError if no process listens at HOST:PORT for some seconds."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdigit():
        return
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline or isinstance(error, socket.gaierror):
                raise ClusterError(
                    f"nobody answers at RAY_ADDRESS={address} ({error.strerror or error}): "
                    "expected the address of a running Ray's head, as HOST:PORT"
                ) from error
            time.sleep(_PAUSE_S)
