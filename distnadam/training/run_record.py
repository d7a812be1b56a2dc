"""The file events.jsonl of a run: what happened beside its steps, one JSON object a line.

Every object has `event` and `time` (seconds since 1970), most have `step`:

    start       task, task_at, command, configuration, versions, host, cpus, resumed_from
    begin       steps are trained from `step`, of `steps` in all
    hosts       shards, standbys and workers: where each runs; shards' bytes and load
    recovery    who, text
    checkpoint  path, bytes, seconds since the run's last one
    message     text, as the terminal shows it
    end         outcome
"""

import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from typing_extensions import override

from distnadam.checkpoint import store
from distnadam.checkpoint.storage.local import is_open_at
from distnadam.client.status import Status
from distnadam.errors import CheckpointError, TrainingError
from distnadam.places import shown
from distnadam.plain_data import NOT_PARSED
from distnadam.training.callbacks import Callback
from distnadam.training.history import History
from distnadam.training.steps import StepRecord
from distnadam.versions import CORE_PACKAGES, installed_version

NAME = "events.jsonl"
_LOADS_EVERY_S = 10.0
_FIELDS: dict[str, dict[str, type]] = {
    "begin": {"step": int, "steps": int},
    "hosts": {"shards": list, "workers": list},
    "recovery": {"step": int, "who": str, "text": str},
    "checkpoint": {"step": int, "path": str},
    "message": {"text": str},
    "end": {"outcome": str},
}
"""What readers take of each event."""
_RECORDED_PACKAGES = (*CORE_PACKAGES, "llvmlite", "torch", "jax", "keras")


class RunRecord(Callback):
    """Appends the events of a run to a file.

    Args:
        path: the file; its directory must exist.
        history: the run's.
        configuration: what the run was made with, as plain data.
        task_at: where the task is defined, as `distnadam train` takes it.
    """

    def __init__(
        self, path: Path, history: History, configuration: Mapping[str, Any], task_at: str
    ) -> None:
        self._path = path
        self._history = history
        self._configuration = configuration
        self._task_at = task_at
        self._file: TextIO | None = None
        self._step = 0
        self._hosts: Any = None
        self._hosts_written = -math.inf
        self._latest: tuple[Status, Mapping[int, str]] | None = None

    @override
    def on_begin(self, step: int, steps: int) -> None:
        self._step = step
        if self._file is None:
            self._open()
        self._write("begin", step=step, steps=steps)

    def _open(self) -> None:
        resumed = self._history.resumed_from
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
        self._write(
            "start",
            task=self.run.task,
            task_at=self._task_at,
            command=sys.argv,
            configuration=self._configuration,
            versions={p: v for p in _RECORDED_PACKAGES if (v := installed_version(p))},
            python=platform.python_version(),
            host=socket.gethostname(),
            cpus=len(os.sched_getaffinity(0)),
            resumed_from=None if resumed is None else str(resumed),
        )

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        self._step = records[-1].step

    @override
    def on_status(self, status: Status, workers: Mapping[int, str]) -> None:
        hosts = (
            [
                (shard.index, shard.node, shard.standby, shard.state == "dead")
                for shard in status.shards
            ],
            dict(workers),
        )
        now, self._latest = time.monotonic(), (status, workers)
        if hosts == self._hosts and now - self._hosts_written < _LOADS_EVERY_S:
            return
        self._hosts, self._hosts_written = hosts, now
        self._write_hosts(status, workers)

    def _write_hosts(self, status: Status, workers: Mapping[int, str]) -> None:
        self._write(
            "hosts",
            step=status.step,
            shards=[
                {
                    "shard": shard.index,
                    "host": shard.node,
                    "standby": shard.standby,
                    "bytes": shard.bytes,
                    "load": shard.load,
                    "lag": shard.lag,
                }
                for shard in status.shards
            ],
            workers=[{"rank": rank, "host": host} for rank, host in sorted(workers.items())],
            transport=status.transport,
        )

    @override
    def on_recovery(self, step: int, who: str, text: str) -> None:
        self._write("recovery", step=step, who=who, text=text)

    @override
    def on_save(self, step: int, path: Path | str) -> None:
        if self._file is not None and not is_open_at(self._path, self._file.fileno()):
            self._file.close()  # it was removed, or moved, with its directory
            self._open()
        self._write("checkpoint", step=step, path=str(path), bytes=_size(path))

    @override
    def on_message(self, text: str) -> None:
        self._write("message", step=self._step, text=text)

    @override
    def on_end(self) -> None:
        if self._latest is not None:
            self._write_hosts(*self._latest)  # for its loads
        self._write("end", step=self._step, outcome=self._history.outcome)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, event: str, **what: Any) -> None:
        if self._file is not None:
            said = _without_secrets({"event": event, "time": round(time.time(), 3), **what})
            line = json.dumps(said, default=str)
            with self._errors():
                self._file.write(line + "\n")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._path}: cannot be written: {error.strerror or error}"
            ) from error


def _without_secrets(value: Any) -> Any:
    """Return plain data with its texts as people may read them: places may have passwords."""
    if isinstance(value, str | Path):
        return shown(str(value))
    if isinstance(value, Mapping):
        return {key: _without_secrets(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(each) for each in value]
    return value


def _size(path: Path | str) -> int | None:
    """Return the bytes of a checkpoint's files, as its manifest lists them; None if it is gone."""
    try:
        return sum(record.size for record in store.load(path).files)
    except CheckpointError:
        return None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run; a line that was cut off or damaged, or is none of ours, is left
    out.
    """
    found = []
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(*NOT_PARSED):
                event = json.loads(line)
                if isinstance(event, dict) and _is_whole(event):
                    found.append(event)
    return found


def _is_whole(event: dict[str, Any]) -> bool:
    kind = event.get("event")
    fields = _FIELDS.get(kind, {}) if isinstance(kind, str) else {"event": str}
    return all(isinstance(event.get(name), kind) for name, kind in fields.items())
