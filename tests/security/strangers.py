"""Another user of the host, for the tests."""

import os
import subprocess
import sys
from typing import Any

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
_BECOME = f"import os\nos.setgroups([])\nos.setgid({NOBODY})\nos.setuid({NOBODY})\n"


HIDING = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && "$@"', "sh"]
"""Begins a command for which /proc hides the processes of other users."""


def can_hide() -> bool:
    """Whether this process may give another one a /proc of its own."""
    return subprocess.run([*HIDING, "true"], capture_output=True, check=False).returncode == 0


def as_nobody(imports: str, code: str, *args: Any, hiding: bool = False) -> str:
    """Run code as another user and return what it prints.

    Imports are made as this user, whose home the other one may not read.
    """
    command = [sys.executable, "-c", f"{imports}\n{_BECOME}{code}", *map(str, args)]
    command = [*HIDING * hiding, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
