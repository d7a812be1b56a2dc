"""The events of `fit` as a Keras callback gets them: an epoch ends with each evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from typing_extensions import override

from distnadam.errors import ConfigError
from distnadam.training.callbacks import Callback
from distnadam.training.steps import StepRecord

Logs = dict[str, float]
"""By name: what is known of a step or an epoch."""

_BATCH_EVENTS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


class EpochCallback(Callback):
    """A callback with the methods of Keras's: override those that are of use.

    `epoch` counts from 0, and goes on where a resumed run does; `batch` is the step's number from
    0. The learning rate may be set in all but the two of a batch, which come in bursts, after
    their steps. In place of `self.model.stop_training = True`, call `self.run.stop(reason)`; in
    place of `self.model.optimizer.learning_rate`, set `self.run.optimizer.lr`.

    >>> class Print(EpochCallback):
    ...     def on_epoch_end(self, epoch, logs=None):
    ...         print(epoch, sorted(logs))
    >>> callback = Print()
    """

    # of the class, so that a subclass needs no super().__init__()
    _began = False
    _rate = math.nan
    _losses = (0.0, 0)  # their sum and number in the epoch
    _logs: Mapping[str, float] = MappingProxyType({})

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """The run begins."""

    def on_train_end(self, logs: Logs | None = None) -> None:
        """The run ends, however; `logs` are the last epoch's."""

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """An epoch begins; so it does again if the run goes back to a checkpoint."""

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """The task has evaluated the parameters."""

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Comes just before `on_train_batch_end`; calls `on_batch_begin`."""
        self.on_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """A step is done; `logs` are its loss and learning rate. Calls `on_batch_end`."""
        self.on_batch_end(batch, logs)

    def on_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """As `on_train_batch_begin`, which calls it unless it is overridden."""

    def on_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """As `on_train_batch_end`, which calls it unless it is overridden."""

    @property
    def model(self) -> Any:
        """What a Keras callback would ask, and there is not.

        Raises:
            AttributeError: always, with what there is.
        """
        raise AttributeError(
            f"{type(self).__name__}: there is no model: self.run.stop(reason) ends the run, "
            "self.run.optimizer has lr, get_params and set_params, and self.run.save(path) saves"
        )

    @override
    def state(self) -> dict[str, Any]:
        """Return the epoch's losses so far; what overrides this adds to it."""
        return {"losses": list(self._losses)}

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        total, count = state.get("losses", (0.0, 0))
        self._losses = float(total), int(count)

    @override
    def on_begin(self, step: int, steps: int) -> None:
        if not self._began:
            self._began = True
            self.on_train_begin({})
        if step < steps and self.run.stopped is None:
            self._begin_epoch(step)

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        total, count = self._losses
        for record in records:
            if record.ranks:  # else nobody lived to report a loss
                total += record.loss
                count += 1
        self._rate, self._losses = records[-1].lr, (total, count)

    @override
    def _hears(self, event: str) -> bool:
        if event == "on_record" and type(self).on_record is EpochCallback.on_record:
            return any(
                getattr(getattr(self, name), "__func__", None) is not getattr(EpochCallback, name)
                for name in _BATCH_EVENTS
            )
        return super()._hears(event)

    @override
    def on_record(self, record: StepRecord) -> None:
        batch = record.step - 1
        self.on_train_batch_begin(batch, {})
        self.on_train_batch_end(batch, {"loss": record.loss, "learning_rate": record.lr})

    @override
    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        total, count = self._losses
        self._losses = (0.0, 0)
        logs = {"loss": total / count} if count else {}
        if not math.isnan(self._rate):
            logs["learning_rate"] = self._rate
        logs |= {f"val_{name}": value for name, value in metrics.items()}
        self._logs = logs
        self.on_epoch_end(self._epoch_of(step - 1), dict(logs))
        if step < self.run.steps and self.run.stopped is None:
            self._begin_epoch(step)

    @override
    def on_end(self) -> None:
        self._began = False  # it may be given to another run
        self.on_train_end(dict(self._logs))

    def _begin_epoch(self, step: int) -> None:
        self.on_epoch_begin(self._epoch_of(step), {})

    def _epoch_of(self, step: int) -> int:
        """Return the epoch of a step, counted from 0."""
        return max(0, step) // (self.run.evaluate_every or self.run.steps)


_EVENTS = (
    "on_epoch_begin",
    "on_epoch_end",
    "on_train_begin",
    "on_train_end",
    "on_train_batch_begin",
    "on_train_batch_end",
)


class LambdaCallback(EpochCallback):
    """Calls functions of `(epoch, logs)`, `(batch, logs)` or `(logs)`, as Keras's does.

    Args:
        on_epoch_begin, on_epoch_end, on_train_begin, on_train_end: what to call.
        on_train_batch_begin, on_train_batch_end: likewise; both come after the step.

    Raises:
        ConfigError: there is no such event.

    >>> seen = []
    >>> callback = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["loss"]))
    """

    def __init__(
        self,
        on_epoch_begin: Callable[[int, Logs], Any] | None = None,
        on_epoch_end: Callable[[int, Logs], Any] | None = None,
        on_train_begin: Callable[[Logs], Any] | None = None,
        on_train_end: Callable[[Logs], Any] | None = None,
        on_train_batch_begin: Callable[[int, Logs], Any] | None = None,
        on_train_batch_end: Callable[[int, Logs], Any] | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise ConfigError(
                f"LambdaCallback: there is no event {', '.join(others)}; there are "
                f"{', '.join(_EVENTS)}"
            )
        given = dict(locals())
        for event in _EVENTS:
            if (function := given[event]) is not None:
                setattr(self, event, function)


class Monitor:
    """Watches one value of the logs of epochs, and knows which direction is better.

    Args:
        monitor: its name, such as "val_loss".
        mode: "min", "max", or "auto": "max" for an accuracy, an AUC or an F-score.
        min_delta: how much better counts as better.
        owner: whose errors these are.

    Attributes:
        best: the best value so far.
    """

    def __init__(self, monitor: str, mode: str, min_delta: float, owner: object) -> None:
        self._owner = type(owner).__name__
        if mode not in ("auto", "min", "max"):
            raise ConfigError(f'{self._owner}: mode must be "auto", "min" or "max", got {mode!r}')
        grows = monitor.endswith(("acc", "accuracy", "auc", "f1", "f1_score", "fmeasure"))
        self.name = monitor
        self.is_max = mode == "max" or (mode == "auto" and grows)
        self._min_delta = abs(min_delta)
        self.best = -math.inf if self.is_max else math.inf

    def value_in(self, logs: Mapping[str, float]) -> float:
        """Return the value.

        Raises:
            ConfigError: the logs have none of that name.
        """
        value = logs.get(self.name, logs.get(f"val_{self.name}"))
        if value is None:
            raise ConfigError(
                f"{self._owner}: monitor={self.name!r}: an epoch has {', '.join(sorted(logs))}; "
                "val_X is the metric X of the task's evaluate"
            )
        return value

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is better than another one, by more than `min_delta`."""
        if self.is_max:
            return value > than + self._min_delta
        return value < than - self._min_delta

    def improves(self, value: float) -> bool:
        """Take a value; whether it is the best so far."""
        if not self.is_better(value, self.best):
            return False
        self.best = value
        return True
