"""An object store without room is waited for, and then named: nothing hangs or is half-applied."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_what_has_no_room_yet_is_sent_once_it_has_and_what_has_none_is_refused() -> None:
    command = [sys.executable, "-m", "tests.backends.ray.full_store"]
    full = os.environ | {"RAY_local_fs_capacity_threshold": "0.001"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=full)
    assert done.returncode == 0 and "held" in done.stdout, done.stdout + done.stderr
