"""What the processes of a Ray that this package joined say, shown where this process's output goes.

Each line begins with who said it and on which host. Ray's own reports, each a wall of text about a
death that may be recovered from, go to a file. A Ray that the user joined shows what it shows.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray._private import worker as ray_worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

_HANDLER = "ray_print_logs"
"""What Ray calls its own handler of lines, which it removes when it disconnects."""
PREFIX = "distnadam"
"""Begins the names of our actors."""
ROLES = SHARD, SUPERVISOR, WORKER, RELAY, PROBE = (
    "Shard",
    "Supervisor",
    "Worker",
    "Relay",
    "Probe",
)
"""How a process's title says what it is; messages say so in small letters."""
_RAYS_OWN = ("raylet", "autoscaler", "gcs_server")
_QUIET_S = 0.3
_DRAIN_S = 2.0


class Output:
    """Shows the lines of one connection to Ray, and keeps Ray's reports.

    Args:
        reports: the file for reports; made at the first one.
    """

    def __init__(self, reports: Path) -> None:
        self.reports = reports
        self._lock = threading.Lock()
        self._named = False
        self._last_s = time.monotonic()

    def take(self, data: Mapping[str, Any]) -> None:
        """Take lines of one process, as Ray's log monitor sends them."""
        if data.get("pid") in _RAYS_OWN:  # in Ray's own logs, whose every line comes here
            return
        name = data.get("actor_name") or data.get("task_name") or f"process {data.get('pid')}"
        for line in data.get("lines", ()):
            self._last_s = time.monotonic()
            words = name.removeprefix(PREFIX).split()
            who = " ".join(word.lower() if word in ROLES else word for word in words)
            where = f"{who} on {data.get('ip')}"
            _print(f"{where}: {line}", is_error=bool(data.get("is_err")))

    def keep(self, lines: Iterable[str]) -> None:
        """Write what Ray itself says to the file; say once where that is."""
        with self._lock, suppress(OSError), self.reports.open("a", encoding="utf-8") as file:
            file.writelines(f"{time.strftime('%F %T')} {line}\n" for line in lines)
            if not self._named:
                self._named = True
                _print(f"distnadam: what Ray reports of its processes is in {self.reports}")

    def drain(self) -> None:
        """Wait until no more lines come: what a process said last takes a moment to get here."""
        began = time.monotonic()
        while time.monotonic() < min(max(began, self._last_s) + _QUIET_S, began + _DRAIN_S):
            time.sleep(_QUIET_S / 10)


class _Shown:
    """The output that is shown, and the connection to Ray that it is of."""

    def __init__(self) -> None:
        self.output: Output | None = None
        self.node: Any = None
        self.print_of_ray: Any = None

    @property
    def now(self) -> Output | None:
        """The output of the present connection, if it is ours."""
        is_ours = self.node is not None and self.node is ray_worker.global_worker.node
        return self.output if is_ours else None

    def print(self, data: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Stand in for Ray's function that prints its reports."""
        if (output := self.now) is not None:
            output.keep(data["lines"])
        else:
            self.print_of_ray(data, *args, **kwargs)


_shown = _Shown()


def show_output() -> None:
    """Show what processes say from now on, in a Ray that this package has just joined.

    Ray must have been told to send lines here (`log_to_driver=True`).
    """
    node = ray_worker.global_worker.node
    directory = Path(node.get_logs_dir_path())
    if not os.access(directory, os.W_OK):  # of another user's Ray
        directory = Path(tempfile.gettempdir())
    _shown.output, _shown.node = Output(directory / f"distnadam-driver-{os.getpid()}.log"), node
    dispatcher.remove_handler(_HANDLER)
    dispatcher.add_handler(_HANDLER, _shown.output.take)
    if _shown.print_of_ray is None:
        _shown.print_of_ray = ray_worker.print_to_stdstream
        ray_worker.print_to_stdstream = _shown.print


def drain_output() -> None:
    """Wait until what processes said so far is shown, in a Ray that this package joined."""
    if (output := _shown.now) is not None:
        output.drain()


def where_reports_are() -> str:
    """Return the end of a sentence about a death: where Ray's report is; "" if it was shown."""
    output = _shown.now
    return "" if output is None else f"; Ray's report is in {output.reports}"


def _print(line: str, *, is_error: bool = True) -> None:
    stream = sys.stderr if is_error else sys.stdout
    with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
        print(line, file=stream, flush=True)
