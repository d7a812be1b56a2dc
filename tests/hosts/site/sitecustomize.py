"""Imported first by every process of a host: logs of `distnadam` go to a file for the tests."""

import logging
import os
from pathlib import Path


class _Filed(logging.Handler):
    """Opens its file at the first line, so that a silent process leaves none."""

    def emit(self, record: logging.LogRecord) -> None:
        path = (
            Path(os.environ["DISTNADAM_TEST_LOGS"])
            / f"{os.environ['DISTNADAM_TEST_HOST']}-{os.getpid()}"
        )
        with path.open("a") as file:
            file.write(f"{record.created:.3f} {record.getMessage()}\n")


if "DISTNADAM_TEST_LOGS" in os.environ:
    _log = logging.getLogger("distnadam")
    _log.setLevel(logging.INFO)
    _log.addHandler(_Filed())
