"""Put before all else on the path of every process of a host: what `distnadam` logs goes to a file
of that process, which tests read.
"""

import logging
import os
from pathlib import Path


class _Filed(logging.Handler):
    """Opens the file at the first line, so that a process which says nothing leaves none; named by
    its host, in the folder for all.
    """

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
