"""Whether a wait may spin for a little before it sleeps: only where this process may use more cores
than the optimizer has processes, so that it takes none of their time. To be woken costs tens of
microseconds, and more in a virtual machine. It knows no frame and no shard.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from time import perf_counter
from typing import TypeVar

from distnadam.protocol.messages import ShardSpec

_Found = TypeVar("_Found")
_SPIN_S = 50e-6
_OTHERS = 2
"""The supervisor and a relay."""


def processes_of(spec: ShardSpec) -> int:
    """Return how many processes of a shard's optimizer there may be on one host at most."""
    return spec.num_shards * (1 + spec.replicas) + spec.num_workers + _OTHERS


def has_free_cores(processes: int) -> bool:
    """Whether this process may use more cores than so many processes take."""
    return min(len(os.sched_getaffinity(0)), quota()) > processes


def quota(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the cores that the control groups of this process may use in all, of either version:
    infinite where nothing limits them, 0 where that cannot be read.

    Args:
        own: the file that names this process's groups.
        root: where the groups' files are.
    """
    try:
        return min(_quotas(own.read_text(), root), default=math.inf)
    except FileNotFoundError:
        return math.inf
    except (OSError, ValueError):
        return 0.0


def _quotas(groups: str, root: Path) -> Iterator[float]:
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "cpu"
        group = PurePosixPath(path.lstrip("/"))
        for folder in (top / each for each in (group, *group.parents)):
            if (both := folder / "cpu.max").exists():
                most, period = both.read_text().split()
            elif (one := folder / "cpu.cfs_quota_us").exists():
                most, period = one.read_text(), (folder / "cpu.cfs_period_us").read_text()
            else:
                continue
            if most != "max" and float(most) >= 0:
                yield float(most) / float(period)


def spin(poll: Callable[[float], _Found]) -> _Found:
    """Return what `poll` finds, asked again and again without waiting for some tens of microseconds
    at most; it is falsy where it is nothing. Whoever waits for this core runs in between.
    """
    until = perf_counter() + _SPIN_S
    while not (found := poll(0)):
        os.sched_yield()  # to whom was just woken on this core
        if perf_counter() > until:
            break
    return found
