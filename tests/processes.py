"""What the tests ask of the operating system about processes."""

import os
import select
from pathlib import Path


def children(pid: int) -> set[int]:
    """Return all processes below one."""
    below: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            below |= {int(stat.parent.name)} | children(int(stat.parent.name))
    return below


def wait_until_gone(pids: set[int]) -> None:
    """Wait until none of the processes runs; the test's own timeout bounds it."""
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            select.select([process], [], [])
        finally:
            os.close(process)
