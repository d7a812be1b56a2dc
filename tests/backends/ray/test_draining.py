"""Nodes of a Ray are left while its processes die, in a process of its own."""

import subprocess
import sys

import pytest

from tests.backends.ray.draining import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_nodes_are_left_one_after_the_other() -> None:
    command = [sys.executable, "-m", "tests.backends.ray.draining"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(case.__name__ in done.stdout for case in CASES)
