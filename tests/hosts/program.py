"""A program on a host, and the events it prints on standard output: lines of JSON among others."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 150.0
"""Seconds in which anything awaited must have come."""


def say(**what: Any) -> None:
    """Print an event, in such a program."""
    print(json.dumps({**what, "time": time.time()}), flush=True)


class Program:
    """One program, whose output a thread reads."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events so far."""
        with self._more:
            return list(self._events)

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        with self._more:
            return "".join(self._lines)

    def tell(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        print(text, file=self._process.stdin, flush=True)

    def first(
        self, what: str, wanted: Callable[[Any], bool] = lambda value: True, *, also: str = "time"
    ) -> Any:
        """Wait for an event with these keys, the first with a given value, and return it.

        Fail if the program ends before.
        """
        deadline, looked = time.monotonic() + PATIENCE_S, 0
        with self._more:
            while True:
                for event in self._events[looked:]:
                    if what in event and also in event and wanted(event[what]):
                        return event
                looked = len(self._events)
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    raise AssertionError(
                        f"{what!r} was not said "
                        f"{'to the end' if self._ended else 'in time'}:\n{''.join(self._lines)}"
                    )
                self._more.wait(left)

    def finish(self, patience_s: float = PATIENCE_S) -> str:
        """Close its standard input, wait for its success, and return all that it has printed."""
        self._hang_up()
        try:
            status = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end in {patience_s:g} s:\n{self.output}") from None
        self._reader.join()
        assert status == 0, self.output
        return self.output

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """Expect that its host, and so its process, has ended."""
        self._hang_up()
        self._process.wait()
        self._reader.join()

    def _hang_up(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._more:
                    self._lines.append(line)
                    if line.startswith("{"):
                        self._events.append(json.loads(line))
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()
