"""What an optimizer may have left on this machine: actors' processes, their sockets and memory,
names in the cluster.
"""

import os
from pathlib import Path

import ray

from tests.processes import children

_ACTORS = (
    "ray::distnadam ",
    "ray::Trainer",
    "ray::Visitor",
)


def leftovers() -> dict[str, int]:
    """Count, over this process and all below it, what `distnadam` made; whatever is not there is
    0.
    """
    found = {
        "actors": 0,
        "sockets": 0,
        "memfds": 0,
        "names": len(ray.util.list_named_actors(all_namespaces=True)),
    }
    ours = _socket_inodes()
    for pid in children(os.getpid()) | {os.getpid()}:
        found["actors"] += _title(pid).startswith(_ACTORS)
        for target in _open_files(pid):
            found["sockets"] += target in ours
            found["memfds"] += target.startswith("/memfd:distnadam")
    return found


def wait_for_no_more_than(before: dict[str, int]) -> dict[str, int]:
    """Count until nothing has more than before: processes take a moment to end; the test's own time
    limit bounds it.
    """
    while True:
        now = leftovers()
        if all(number <= before[what] for what, number in now.items()):
            return now


def _socket_inodes() -> set[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()
    return {
        f"socket:[{line.split()[6]}]" for line in lines if line.split()[-1].startswith("@distnadam")
    }


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _open_files(pid: int) -> list[str]:
    try:
        return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []
