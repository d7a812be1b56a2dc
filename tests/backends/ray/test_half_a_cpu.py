"""A host with half of the CPU that its shard needs is named, and given less of the state."""

import os
import subprocess
import sys

import pytest

from tests.backends.ray.half_a_cpu import CGROUPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_host_with_half_of_the_cpu_that_it_needs_is_named_and_steps_less_once_balanced() -> None:
    if not (CGROUPS / "cpu.cfs_quota_us").exists() or not os.access(CGROUPS, os.W_OK):
        pytest.skip("no cgroups of version 1 that can be given quotas of CPU time")
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.ray.half_a_cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
