"""Which backend is meant here and now, and the running optimizers of Ray by their names. Imports
Ray's backend only where Ray is meant.
"""

import importlib.util
import os
import secrets
import sys

from distnadam.backends.base import Backend
from distnadam.config import BackendName
from distnadam.errors import ClusterError
from distnadam.protocol.messages import ShardSpec


def choose(asked: BackendName, *, several: bool) -> Backend:
    """Return a backend with no shards yet; `several` says whether more than one shard or worker is
    wanted.
    """
    if asked == "auto":
        ray = sys.modules.get("ray")
        running = (ray is not None and ray.is_initialized()) or bool(os.environ.get("RAY_ADDRESS"))
        asked = "ray" if running or (several and _installed()) else "local"
    if asked == "local":
        from distnadam.backends.local import LocalBackend

        return LocalBackend()
    if not _installed():
        raise ClusterError(
            "backend='ray' needs the package ray: pip install ray, or use backend='local'"
        )
    _ask_for_a_token()
    from distnadam.backends.ray.backend import RayBackend

    return RayBackend()


def _ask_for_a_token() -> None:
    """See to it that a Ray of our own is behind a token: Ray before 2.59 must be told before it is
    imported.
    """
    told = {
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    } & os.environ.keys()
    if "ray" not in sys.modules and not told:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def connect(name: str) -> tuple[Backend, ShardSpec]:
    """Return a backend that reaches a running named optimizer, and the spec of its shard 0; raise
    NotRunning where there is none.
    """
    from distnadam.backends.ray.backend import RayBackend

    return RayBackend.connect(name)


def stop(name: str) -> None:
    """End a running named optimizer, or what is left of one; raise NotRunning where there is
    nothing of it.
    """
    from distnadam.backends.ray.backend import RayBackend

    RayBackend.stop(name)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("ray") is not None
    except ImportError:  # its import is blocked
        return False
