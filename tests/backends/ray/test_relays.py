"""Relays as processes of a Ray of two nodes: made on demand, watched, replaced, and ended."""

import subprocess
import sys

import pytest

from tests.backends.ray.on_two_nodes import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("case", CASES)
def test_relays_on_two_nodes(case: str) -> None:
    command = [sys.executable, "-m", "tests.backends.ray.on_two_nodes", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
