"""A terminal for a command: what stands on its screen, as far as a live panel writes it."""

import codecs
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.eventually import eventually

_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n\x08])|([^\x1b\r\n\x08]+)|\x1b")
_CUT_OFF = re.compile(r"\x1b(\[[0-9;?]*)?\Z")
_WITH_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Screen:
    """Lines of text of a width, written as a terminal would; those above the screen stay."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._lines: list[list[str]] = [[]]
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Write text with the control sequences of a live panel; colours are passed over."""
        for number, kind, mark, words in _CONTROL.findall(text):
            if mark == "\n":
                self._down()
            elif mark in ("\r", "\x08"):
                self._column = 0 if mark == "\r" else max(0, self._column - 1)
            elif kind == "A":
                self._row = max(0, self._row - int(number or 1))
            elif kind == "K":
                line = self._lines[self._row]
                del line[0 if number == "2" else self._column :]
            for letter in words:
                self._put(letter)

    def _put(self, letter: str) -> None:
        if self._column == self._width:
            self._column = 0
            self._down()
        line = self._lines[self._row]
        line += " " * (self._column + 1 - len(line))
        line[self._column] = letter
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        while len(self._lines) <= self._row:
            self._lines.append([])

    def __str__(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self._lines)


class OnTerminal:
    """A Python program with a terminal of its own, for a `with` block; killed at its end.

    Args:
        args: of Python.
        directory: where it runs.
        width: of the terminal.
        environment: beside that of this process.
    """

    def __init__(
        self, args: list[str], directory: Path, width: int = 80, **environment: str
    ) -> None:
        self._screen = Screen(width)
        self._master, slave = pty.openpty()
        of_terminal = {"COLUMNS": str(width), "LINES": "60", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WITH_TERMINAL, *args],
            cwd=directory,
            env=os.environ | of_terminal | environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        with suppress(OSError):  # the other end is closed
            while raw := os.read(self._master, 65536):
                text = rest + decoder.decode(raw)
                whole = _CUT_OFF.search(text)
                cut = whole.start() if whole else len(text)
                rest = text[cut:]
                self._screen.write(text[:cut])

    def shows(self, expected: Callable[[str], Any], timeout_s: float = 300.0) -> str:
        """Wait until the screen is as expected, and return it."""
        seen = [""]

        def is_shown() -> bool:
            seen[0] = str(self._screen)
            return bool(expected(seen[0]))

        eventually(is_shown, timeout_s)
        return seen[0]

    def type(self, keys: str) -> None:
        """Type keys, such as "\\x03" for Ctrl-C."""
        os.write(self._master, keys.encode())

    def end(self, timeout_s: float = 300.0) -> tuple[int, str]:
        """Wait for the program's end; return its status, and the screen."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status, str(self._screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
