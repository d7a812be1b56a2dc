"""Which backend is meant here and now, and the running optimizers of Ray by their names. Imports Ray's backend only where Ray is meant."""

import importlib.util
import os
import sys
from typing import Literal

from distnadam.backends.base import Backend
from distnadam.errors import ClusterError
from distnadam.messages import ShardSpec

BackendName = Literal["auto", "local", "ray"]


def choose(asked: BackendName, *, several: bool) -> Backend:
    """Return a backend with no shards yet; `several` says whether more than one shard or worker is wanted."""
    if asked == "auto":
        ray = sys.modules.get("ray")
        running = (ray is not None and ray.is_initialized()) or bool(os.environ.get("RAY_ADDRESS"))
        asked = "ray" if running or (several and _installed()) else "local"
    if asked == "local":
        from distnadam.backends.local import LocalBackend

        return LocalBackend()
    if not _installed():
        raise ClusterError("backend='ray' needs the package ray: pip install ray, or use backend='local'")
    from distnadam.backends.ray import RayBackend

    return RayBackend()


def connect(name: str) -> tuple[Backend, ShardSpec]:
    """Return a backend that reaches a running named optimizer, and the spec of its shard 0; raise NotRunning where there is none."""
    from distnadam.backends.ray import RayBackend

    return RayBackend.connect(name)


def stop(name: str) -> None:
    """End a running named optimizer, or what is left of one; raise NotRunning where there is nothing of it."""
    from distnadam.backends.ray import RayBackend

    RayBackend.stop(name)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("ray") is not None
    except ImportError:  # its import is blocked
        return False
