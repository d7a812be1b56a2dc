"""Keras's callbacks that set the learning rate between two epochs."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from distnadam.callbacks.epochs import EpochCallback, Logs, Monitor
from distnadam.errors import ConfigError

log = logging.getLogger("distnadam")


class LearningRateScheduler(EpochCallback):
    """Sets the learning rate at the beginning of each epoch.

    A schedule by step needs no callback: give it to the optimizer, ``DistNadam(lr=WarmupCosine(
    ...))``.

    Args:
        schedule: of `(epoch, lr)` or of `(epoch)`, returns the new rate.
        verbose: 1 logs each change.

    >>> callback = LearningRateScheduler(lambda epoch, lr: lr if epoch < 10 else 0.9 * lr)
    """

    def __init__(self, schedule: Callable[..., float], verbose: int = 0) -> None:
        self._schedule = schedule
        self._verbose = verbose
        try:
            inspect.signature(schedule).bind(0, 0.1)
            self._takes_rate = True
        except (TypeError, ValueError):
            self._takes_rate = False

    @override
    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        before = _rate_of(self)
        rate = self._schedule(epoch, before) if self._takes_rate else self._schedule(epoch)
        if not isinstance(rate, (int, float)):
            raise ConfigError(
                f"LearningRateScheduler: epoch {epoch}: the schedule must return a number, got "
                f"{rate!r}"
            )
        if float(rate) != before:
            self.run.optimizer.lr = float(rate)
            if self._verbose:
                log.warning("Epoch %d: LearningRateScheduler sets lr to %g", epoch + 1, rate)


class ReduceLROnPlateau(EpochCallback):
    """Multiplies the learning rate by `factor` once a value has not improved for `patience` epochs.

    Args:
        monitor: a name in an epoch's logs.
        factor: below 1.
        patience: epochs without an improvement.
        verbose: 1 logs each change.
        mode: "min", "max" or "auto".
        min_delta: how much better counts as better.
        cooldown: epochs after a change in which none is counted.
        min_lr: the least rate.

    >>> callback = ReduceLROnPlateau(monitor="val_accuracy", factor=0.5, patience=5, min_lr=1e-5)
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        if not 0 < factor < 1:
            raise ConfigError(f"ReduceLROnPlateau: factor must be in (0, 1), got {factor!r}")
        self._monitor = Monitor(monitor, mode, min_delta, self)
        self._factor = factor
        self._patience = patience
        self._verbose = verbose
        self._cooldown = cooldown
        self._min_lr = min_lr
        self.wait = 0
        self._cools = 0

    @property
    def best(self) -> float:
        """The best value so far; an infinite one before the first."""
        return self._monitor.best

    @override
    def state(self) -> dict[str, Any]:
        own = {"best": self.best, "waited": self.wait, "cools": self._cools}
        return super().state() | own

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._monitor.best = float(state["best"])
        self.wait, self._cools = int(state["waited"]), int(state["cools"])

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        value = self._monitor.value_in(logs or {})
        if self._cools > 0:
            self._cools -= 1
            self.wait = 0
        if self._monitor.improves(value):
            self.wait = 0
        elif self._cools == 0:
            self.wait += 1
            if self.wait >= self._patience:
                self._reduce(epoch)

    def _reduce(self, epoch: int) -> None:
        before = _rate_of(self)
        if before <= self._min_lr:
            return
        rate = max(before * self._factor, self._min_lr)
        self.run.optimizer.lr = rate
        self._cools, self.wait = self._cooldown, 0
        if self._verbose:
            log.warning("Epoch %d: ReduceLROnPlateau reduces lr to %g", epoch + 1, rate)


def _rate_of(callback: EpochCallback) -> float:
    """Return the optimizer's learning rate; raise ConfigError if it is a schedule."""
    rate = callback.run.optimizer.lr
    if callable(rate):
        raise ConfigError(
            f"{type(callback).__name__}: the optimizer's lr is the schedule "
            f"{type(rate).__name__}, which sets it at every step: give lr a number"
        )
    return rate
