"""Keras's `CSVLogger`: a row for each epoch."""

import csv
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

from distnadam.callbacks.epochs import EpochCallback, Logs


class CSVLogger(EpochCallback):
    """Writes a row for each epoch: its number, then its logs by name; the run has metrics.csv too.

    Args:
        filename: the file.
        separator: between two values.
        append: whether to keep what the file holds, as for a resumed run.

    >>> callback = CSVLogger("epochs.csv", append=True)
    """

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False) -> None:
        self._path = Path(filename)
        self._separator = separator
        self._append = append
        self._file: IO[Any] | None = None
        self._writer: Any = None
        self._header_written = False

    @override
    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._header_written = (
            self._append and self._path.exists() and self._path.stat().st_size > 0
        )
        mode = "a" if self._append else "w"
        self._file = self._path.open(mode, newline="", encoding="utf-8", buffering=1)

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if self._file is None:
            return
        row = {"epoch": epoch, **dict(sorted((logs or {}).items()))}
        if self._writer is None:
            self._writer = csv.DictWriter(
                self._file,
                list(row),
                restval="NA",
                extrasaction="ignore",
                delimiter=self._separator,
            )
            if not self._header_written:
                self._writer.writeheader()
        self._writer.writerow(row)

    @override
    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._writer = None
