"""The command line: reads arguments, calls the library, prints. Exit codes: 0 well, 1 failed, 2
wrong usage, 130 Ctrl-C.
"""

from distnadam.cli import checkpoints, doctor, interop, running, training
from distnadam.cli.group import main

__all__ = ["checkpoints", "doctor", "interop", "main", "running", "training"]
