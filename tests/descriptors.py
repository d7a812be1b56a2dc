"""What a process has open, by kind: a leak shows as one kind that grows."""

import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

LISTENS, CONNECTED = "sockets of shards", "connections of workers"
"""Where a shard, or a relay in its place, listens for workers of its host, and who is connected."""
MEMORY = "/memfd:distnadam (deleted)"
"""Memory that processes share, two for each arena."""
_ACCEPTS = "00010000"
"""Flags of a socket that listens, in /proc/net/unix."""


def descriptors_of(pid: int) -> Counter[str]:
    """Return how many descriptors of each kind a process has.

    Raises:
        OSError: it has ended.
    """
    process, kinds = Path(f"/proc/{pid}"), Counter[str]()
    sockets = _sockets(process)
    for name in os.listdir(process / "fd"):
        with suppress(OSError):  # closed just now
            target = os.readlink(process / "fd" / name)
            inode = re.fullmatch(r"socket:\[(\d+)\]", target)
            kind = re.sub(r"\d+", "N", target)
            kinds[kind if inode is None else sockets.get(inode[1], "other socket")] += 1
    return kinds


def _sockets(process: Path) -> dict[str, str]:
    """Return what each socket of a process's network namespace is, by its inode."""
    found = {}
    for family in ("tcp", "tcp6", "unix"):
        for line in (process / "net" / family).read_text().splitlines()[1:]:
            words = line.split()
            if family != "unix":
                found[words[9]] = family
            elif len(words) > 7 and words[7].startswith("@distnadam-"):
                found[words[6]] = LISTENS if words[3] == _ACCEPTS else CONNECTED
            else:
                found[words[6]] = family
    return found
