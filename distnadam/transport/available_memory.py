"""How much memory this process can still get: the machine's, and that of its control groups."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hierarchy:
    """The control groups of one version: where they are, and what their files are called."""

    root: str
    limit: str
    used: str
    cached: tuple[str, ...]


_VERSION_2 = Hierarchy(
    "/sys/fs/cgroup",
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
)
_VERSION_1 = Hierarchy(
    "/sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def available_bytes() -> int:
    """Return the bytes that this process can still get, as far as the system says so."""
    return min([*_machine_room(), *_group_room()], default=sys.maxsize)


def _machine_room() -> list[int]:
    with suppress(OSError, ValueError, KeyError, IndexError):  # /proc is hidden, or another's
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return [int(fields["MemAvailable"].split()[0]) * 1024]
    return []


def _group_room() -> Iterator[int]:
    """Yield the room in this process's group and in each that it lies in, if they are limited."""
    for hierarchy, path in groups_of_memory():
        root = Path(hierarchy.root)
        # in a container the path may be the host's, and the root this process's own group
        for directory in (root / path, *(root / path).parents):
            if directory == root.parent:
                break
            with suppress(OSError, ValueError):  # no such group, or "max"
                limit = int((directory / hierarchy.limit).read_text())
                used = int((directory / hierarchy.used).read_text())
                yield max(0, limit - used + _cached(directory, hierarchy))


def groups_of_memory() -> Iterator[tuple[Hierarchy, str]]:
    """Yield this process's group in each hierarchy that may limit memory, as a path in it."""
    lines = []
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield _VERSION_2, path.lstrip("/")
        elif "memory" in controllers.split(","):
            yield _VERSION_1, path.lstrip("/")


def _cached(directory: Path, hierarchy: Hierarchy) -> int:
    """Return the bytes of files, and of what is known of them, that the system drops when memory
    is needed.
    """
    with suppress(OSError, ValueError):
        lines = (directory / "memory.stat").read_text().splitlines()
        fields = dict(line.split(" ", 1) for line in lines)
        return sum(int(fields.get(name, 0)) for name in hierarchy.cached)
    return 0
