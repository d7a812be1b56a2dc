"""Hears what is said of long waits."""

import logging
import threading
from collections.abc import Iterator

import pytest
from typing_extensions import override


class Said(logging.Handler):
    """What is said by those who wait, and the first time of it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._first = threading.Event()

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if "it waits on" in record.getMessage():
            self.messages.append(record.getMessage())
            self._first.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody says for whom it waits."""
        return self._first.wait(timeout_s)


@pytest.fixture
def said() -> Iterator[Said]:
    heard, log = Said(), logging.getLogger("distnadam")
    log.addHandler(heard)
    yield heard
    log.removeHandler(heard)
