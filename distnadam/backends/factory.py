"""Chooses a backend, and finds running optimizers by name. Imports Ray's backend only if needed."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from distnadam.backends.base import Backend, Hosts
from distnadam.config import BackendName, Options
from distnadam.errors import ClusterError
from distnadam.extras import how_to_install
from distnadam.planning.measuring import HostSpeed
from distnadam.protocol.messages import ShardSpec
from distnadam.transport.link import Link, Links


def resolve(asked: BackendName, *, several: bool) -> Literal["local", "ray"]:
    """Return which backend is meant.

    Args:
        asked: the backend's name; "auto" is Ray's if Ray runs or `RAY_ADDRESS` is set, or if it is
            installed and `several`.
        several: whether there will be more than one shard or worker.
    """
    if asked != "auto":
        return asked
    return "ray" if can_join() or (several and _is_installed()) else "local"


def start_in_words(asked: BackendName, *, several: bool) -> str | None:
    """Return what comes before shards are there, which takes seconds; None in this process."""
    if resolve(asked, several=several) == "local":
        return None
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return "starting"
    address = os.environ.get("RAY_ADDRESS")
    return f"joining the Ray at {address}, starting" if address else "starting Ray and"


def choose(asked: BackendName, *, several: bool) -> Backend:
    """Return the backend that `resolve` means, without shards yet.

    Raises:
        ClusterError: Ray was asked for and is not installed.
    """
    if resolve(asked, several=several) == "local":
        with _imports():
            from distnadam.backends.local import LocalBackend

        return LocalBackend()
    if not _is_installed():
        raise ClusterError(
            f"backend='ray' needs the package ray: {how_to_install('ray')}, or use backend='local'"
        )
    _require_token()
    with _imports():
        from distnadam.backends.ray.backend import RayBackend

    return RayBackend()


@contextmanager
def _imports() -> Iterator[None]:
    """Say that a backend cannot be imported, as where no more files may be open."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise ClusterError(f"the backend cannot be imported: {error}") from error


def _require_token() -> None:
    """Have a Ray that we start require a token; Ray before 2.59 reads this when it is imported."""
    set_by_user = {
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    } & os.environ.keys()
    if "ray" not in sys.modules and not set_by_user:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def connect(name: str) -> tuple[Backend, ShardSpec]:
    """Return a backend of a running named optimizer, and the spec of its shard 0.

    Raises:
        NotRunning: no optimizer of that name runs.
    """
    from distnadam.backends.ray.backend import RayBackend

    return RayBackend.connect(name)


def stop(name: str) -> None:
    """End a running named optimizer, or what is left of one.

    Raises:
        NotRunning: nothing of that name is left.
    """
    from distnadam.backends.ray.backend import RayBackend

    RayBackend.stop(name)


def can_join() -> bool:
    """Whether this process is on a Ray, or knows the address of one."""
    ray = sys.modules.get("ray")
    return (ray is not None and ray.is_initialized()) or bool(os.environ.get("RAY_ADDRESS"))


def keep_ray(options: Options) -> None:
    """Have a Ray in this process until it ends: that which it is on or knows of, or a new one."""
    _require_token()
    from distnadam.backends.ray.session import keep_ray

    keep_ray(options)


def how_to_join() -> dict[str, str]:
    """Return the variables with which another process joins the Ray that this one is on."""
    from distnadam.backends.ray.session import how_to_join

    return how_to_join()


def examine(ports: tuple[int, int] | None, measured: Sequence[str] | None) -> Links:
    """Try the ways between all nodes of a Ray cluster; see `backends.ray.links.examine`.

    Raises:
        ClusterError: Ray is not installed, or there is none to join.
    """
    if not _is_installed():
        raise ClusterError(
            f"the way to another host needs the package ray: {how_to_install('ray')}"
        )
    from distnadam.backends.ray.links import examine

    return examine(ports, measured)


def measure_hosts(ports: tuple[int, int] | None) -> tuple[list[HostSpeed], list[Link]]:
    """Measure all nodes of a Ray cluster at once; see `backends.ray.links.measure_hosts`.

    Raises:
        ClusterError: Ray is not installed, there is none to join, or a node did not answer.
    """
    if not _is_installed():
        raise ClusterError(f"measuring hosts needs the package ray: {how_to_install('ray')}")
    from distnadam.backends.ray.links import measure_hosts

    return measure_hosts(ports)


def hosts() -> Hosts:
    """Return the hosts of this process's Ray, or of RAY_ADDRESS.

    Raises:
        NotRunning, ClusterError: there is none, or it cannot be joined.
    """
    if not _is_installed():
        raise ClusterError(f"the hosts of a cluster need the package ray: {how_to_install('ray')}")
    from distnadam.backends.ray.cordon import RayHosts

    return RayHosts()


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("ray") is not None
    except ImportError:  # its import is blocked
        return False
