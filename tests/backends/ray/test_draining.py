"""Nodes of a Ray are left while its processes die, in a process of its own."""

import subprocess
import sys

import pytest

from tests.backends.ray.draining import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_nodes_are_left_one_after_the_other(quarter: int) -> None:
    names = [case.__name__ for case in CASES[quarter::4]]
    command = [sys.executable, "-m", "tests.backends.ray.draining", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in names)
