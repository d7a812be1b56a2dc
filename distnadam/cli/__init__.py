"""The command line: parses arguments, calls the library, prints the result.

Exit codes: 0 success, 1 failure, 2 wrong usage, 75 Ray itself died: give the command again, 130
Ctrl-C, 143 SIGTERM.
"""

from distnadam.cli import (
    checkpoints,
    completion,
    doctor,
    draining,
    interop,
    planning,
    report,
    resharding,
    running,
    training,
)
from distnadam.cli.group import main

__all__ = [
    "checkpoints",
    "completion",
    "doctor",
    "draining",
    "interop",
    "main",
    "planning",
    "report",
    "resharding",
    "running",
    "training",
]
