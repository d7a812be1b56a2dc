"""Control groups of memory for tests, real ones: what is in one may take no more than it says."""

import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from distnadam.transport.available_memory import Hierarchy, groups_of_memory
from tests.eventually import eventually


class Group:
    """One control group.

    Args:
        directory: its directory.
        hierarchy: the one that it is in.
    """

    def __init__(self, directory: Path, hierarchy: Hierarchy) -> None:
        self._directory = directory
        self._limit = hierarchy.limit
        self._used = hierarchy.used

    def limit(self, num_bytes: int) -> None:
        """Let it have so many bytes."""
        (self._directory / self._limit).write_text(str(num_bytes))

    def used(self) -> int:
        """Return the bytes that it has."""
        return int((self._directory / self._used).read_text())

    def add(self, pids: Collection[int]) -> None:
        """Have processes, and those that they start from now on, in it."""
        for pid in pids:
            (self._directory / "cgroup.procs").write_text(str(pid))

    def is_empty(self) -> bool:
        """Whether all its processes have ended."""
        return not (self._directory / "cgroup.procs").read_text()


@contextmanager
def memory_group() -> Iterator[Group]:
    """Make a group within this process's own; skip the test where that is not allowed."""
    made = None
    for hierarchy, path in groups_of_memory():
        directory = Path(hierarchy.root) / path / f"distnadam-{secrets.token_hex(4)}"
        with suppress(OSError):
            directory.mkdir()
            if (directory / hierarchy.limit).exists():
                made = hierarchy
                break
            directory.rmdir()
    if made is None:
        pytest.skip("no control group of memory can be made here")
    group = Group(directory, made)
    try:
        yield group
    finally:
        eventually(group.is_empty)
        directory.rmdir()
