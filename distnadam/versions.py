"""The packages that shards compute and communicate with, and their installed versions.

`doctor` shows them; the Ray backend requires the same ones on every node.
"""

import importlib.metadata

CORE_PACKAGES = (
    "distnadam",
    "numpy",
    "ray",
    "ml_dtypes",
    "msgpack",
    "optree",
    "safetensors",
    "xxhash",
)
"""The packages whose versions must be equal on all nodes."""


def installed_version(package: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
