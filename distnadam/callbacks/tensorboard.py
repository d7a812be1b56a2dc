"""Keras's `TensorBoard`: the logs as event files. The package tensorboard is imported here alone,
when a run begins.
"""

import time
from pathlib import Path
from typing import Any

from typing_extensions import override

from distnadam.callbacks.epochs import EpochCallback, Logs
from distnadam.errors import ConfigError, TrainingError
from distnadam.extras import how_to_install
from distnadam.training.steps import StepRecord


class TensorBoard(EpochCallback):
    """Writes event files that TensorBoard shows: tags as Keras has them, under train/ and
    validation/.

    Args:
        log_dir: the directory.
        histogram_freq, write_graph, write_images, profile_batch, embeddings_freq,
            embeddings_metadata: as Keras has them, by default none; nothing else is supported.
        write_steps_per_second: whether to write `epoch_steps_per_second`.
        update_freq: "epoch"; or "batch", or a number of steps, for losses and learning rates of
            steps (`batch_loss`), and the milliseconds of their phases (`phase_ms/compute`, ...).

    Raises:
        ConfigError: something is asked for that is not supported.

    >>> callback = TensorBoard("logs", update_freq=10)
    """

    def __init__(
        self,
        log_dir: str | Path = "logs",
        histogram_freq: int = 0,
        write_graph: bool = True,
        write_images: bool = False,
        write_steps_per_second: bool = False,
        update_freq: int | str = "epoch",
        profile_batch: Any = 0,
        embeddings_freq: int = 0,
        embeddings_metadata: Any = None,
    ) -> None:
        refused = {
            "histogram_freq": histogram_freq,
            "write_images": write_images,
            "profile_batch": profile_batch,
            "embeddings_freq": embeddings_freq,
            "embeddings_metadata": embeddings_metadata,
        }
        if asked := [f"{name}={value!r}" for name, value in refused.items() if value]:
            raise ConfigError(f"TensorBoard: {', '.join(asked)} is not supported: leave it out")
        del write_graph  # there is none
        every = {"epoch": 0, "batch": 1}.get(update_freq) if isinstance(update_freq, str) else None
        self._every = update_freq if isinstance(update_freq, int) and update_freq > 0 else every
        if self._every is None:
            raise ConfigError(
                'TensorBoard: update_freq must be "epoch", "batch" or a number of steps above 0, '
                f"got {update_freq!r}"
            )
        self._log_dir = Path(log_dir)
        self._writes_rate = write_steps_per_second
        self._writers: dict[str, Any] = {}
        self._step_at = (0, 0.0)  # when the epoch began

    @override
    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._step_at = (self.run.step, time.monotonic())

    @override
    def on_train_begin(self, logs: Logs | None = None) -> None:
        _event_classes()  # said before the first step

    @override
    def on_record(self, record: StepRecord) -> None:
        super().on_record(record)
        if self._every and record.step % self._every == 0:
            values = {"batch_loss": record.loss, "batch_learning_rate": record.lr}
            phases = record.phases._asdict().items()
            values |= {f"phase_ms/{name}": 1e3 * seconds for name, seconds in phases}
            self._write("train", record.step, values)

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        validation = {name: value for name, value in logs.items() if name.startswith("val_")}
        train = {f"epoch_{name}": logs[name] for name in logs.keys() - validation.keys()}
        step, began = self._step_at
        if self._writes_rate and self.run.step > step:
            seconds = max(time.monotonic() - began, 1e-9)
            train["epoch_steps_per_second"] = (self.run.step - step) / seconds
        self._write("train", epoch, train)
        named = {f"epoch_{name.removeprefix('val_')}": v for name, v in validation.items()}
        self._write("validation", epoch, named)

    @override
    def on_train_end(self, logs: Logs | None = None) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, where: str, step: int, values: Logs) -> None:
        if not values:
            return
        make_writer, event, summary = _event_classes()
        if where not in self._writers:
            self._writers[where] = make_writer(str(self._log_dir / where))
        found = [summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writers[where].add_event(
            event(wall_time=time.time(), step=step, summary=summary(value=found))
        )
        self._writers[where].flush()


def _event_classes() -> tuple[Any, Any, Any]:
    """Return TensorBoard's own writer of event files, and what it writes."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise TrainingError(
            f"TensorBoard needs the package tensorboard: {how_to_install('tensorboard')}"
        ) from error
    return EventFileWriter, Event, Summary
