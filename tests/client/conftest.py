"""Hears what is said of long waits."""

import logging
import threading
from collections.abc import Iterator

import pytest
from typing_extensions import override


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if "it waits on" in record.getMessage():
            self.event.set()


@pytest.fixture
def said() -> Iterator[threading.Event]:
    """Is set once somebody who waits says for whom."""
    heard, log = _Heard(), logging.getLogger("distnadam")
    log.addHandler(heard)
    yield heard.event
    log.removeHandler(heard)
