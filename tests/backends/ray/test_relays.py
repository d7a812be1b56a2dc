"""Relays as processes of a Ray of two nodes: made on demand, watched, replaced, and ended."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.backends.ray.on_two_nodes import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class TwoNodes:
    """A process with a Ray of two nodes, which runs one case after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.backends.ray.on_two_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def runs(self) -> bool:
        """Whether no case has failed."""
        return self._process.poll() is None

    def run(self, case: str) -> None:
        """Run a case; fail with all that the process says if it does not hold."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(case, file=self._process.stdin, flush=True)
        said = []
        for line in self._process.stdout:
            if line.strip() == case:
                return
            said.append(line)
        self._process.wait()
        raise AssertionError("".join(said))

    def close(self) -> str:
        """Have the process end its Ray and itself; return what it says meanwhile."""
        said, _ = self._process.communicate()
        return said if self._process.returncode else ""


@pytest.fixture(scope="module")
def started() -> Iterator[list[TwoNodes]]:
    processes: list[TwoNodes] = []
    yield processes
    ends = [process.close() for process in processes]
    assert not ends or not ends[-1], ends[-1]


@pytest.fixture
def nodes(started: list[TwoNodes]) -> TwoNodes:
    if not started or not started[-1].runs:
        started.append(TwoNodes())
    return started[-1]


@pytest.mark.parametrize("case", CASES)
def test_relays_on_two_nodes(case: str, nodes: TwoNodes) -> None:
    nodes.run(case)
