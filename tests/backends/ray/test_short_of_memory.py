"""A node that has too little memory for a shard is named before the shard begins."""

import subprocess
import sys

import pytest

from tests.control_groups import memory_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_what_does_not_fit_on_a_node_is_refused_and_what_is_there_goes_on() -> None:
    with memory_group():
        pass  # else skipped
    command = [sys.executable, "-m", "tests.backends.ray.short_of_memory"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "held" in done.stdout, done.stdout + done.stderr
