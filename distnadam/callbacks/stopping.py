"""Keras's callbacks that stop a run, and the one that keeps its best parameters."""

import logging
import math
from pathlib import Path
from typing import Any

from typing_extensions import override

from distnadam.callbacks.epochs import EpochCallback, Logs, Monitor
from distnadam.checkpoint import store
from distnadam.errors import ConfigError, DistNadamError, TrainingError
from distnadam.optimizer import DistNadam
from distnadam.training.callbacks import Callback
from distnadam.training.steps import StepRecord

log = logging.getLogger("distnadam")


class TerminateOnNaN(Callback):
    """Stops the run once a loss is not finite.

    A gradient that is not finite ends the step anyway, or skips it: ``Options(on_nonfinite=...)``.

    Args:
        raise_error: whether `fit` raises a TrainingError, in place of returning.

    >>> callback = TerminateOnNaN()
    """

    def __init__(self, raise_error: bool = False) -> None:
        self._raises = raise_error

    @override
    def on_record(self, record: StepRecord) -> None:
        if record.ranks and not math.isfinite(record.loss):
            why = f"TerminateOnNaN: the loss of step {record.step} is {record.loss}"
            if self._raises:
                raise TrainingError(why)
            self.run.stop(why)


class EarlyStopping(EpochCallback):
    """Stops the run once a value has not improved for `patience` epochs.

    Args:
        monitor: a name in an epoch's logs.
        min_delta: how much better counts as better.
        patience: epochs without an improvement.
        verbose: 1 logs what it does.
        mode: "min", "max" or "auto".
        baseline: what must be surpassed for an epoch to count as an improvement.
        restore_best_weights: whether the parameters of the best epoch are set when it stops the
            run, or the run ends with its last epoch; its last checkpoint has them, with the slots
            of its last step. Each best epoch is saved in ``best_epoch`` in the run's directory,
            for a run that resumes.
        start_from_epoch: epochs before this one are not looked at.

    Attributes:
        stopped_epoch: the epoch that it stopped at; 0 if it has not.
        best_epoch: that of the best value.
        best: the best value; an infinite one before the first.
        wait: epochs since the last improvement.

    >>> callback = EarlyStopping(monitor="val_accuracy", patience=5, restore_best_weights=True)
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        self._monitor = Monitor(monitor, mode, min_delta, self)
        self._patience = patience
        self._verbose = verbose
        self._baseline = baseline
        self._restores = restore_best_weights
        self._first = start_from_epoch
        self.wait = 0
        self._best: Any = None
        self.stopped_epoch = 0
        self.best_epoch = 0

    @override
    def state(self) -> dict[str, Any]:
        return super().state() | {
            "best": self.best,
            "waited": self.wait,
            "best_epoch": self.best_epoch,
            "stopped_epoch": self.stopped_epoch,
        }

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._monitor.best = float(state["best"])
        self.wait, self.best_epoch = int(state["waited"]), int(state["best_epoch"])
        self.stopped_epoch = int(state["stopped_epoch"])
        self._best = None  # at the first need, from what `_keep` has saved

    @override
    def stops_again(self) -> bool:
        return self.wait >= self._patience

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if epoch < self._first:
            return
        value = self._monitor.value_in(logs or {})
        if self._restores and self._best is None and not self._find(epoch):
            self._keep(epoch)  # the first, should none be better than a NaN
        self.wait += 1
        if self._monitor.improves(value):
            self._keep(epoch)
            if self._baseline is None or self._monitor.is_better(value, self._baseline):
                self.wait = 0
            return
        if self.wait >= self._patience and epoch > 0:
            self._stop(epoch)
        elif self._restores and self.run.step >= self.run.steps:
            self.run.optimizer.set_params(self._best)

    @property
    def best(self) -> float:
        """The best value so far; an infinite one before the first."""
        return self._monitor.best

    def _keep(self, epoch: int) -> None:
        self.best_epoch = epoch
        if self._restores:
            self._best = self.run.optimizer.get_params()
            store.prune(self._place, 1, self.run.save(self._place))

    @property
    def _place(self) -> Path:
        """Where a resumed run finds the parameters of the best epoch."""
        return self.run.directory / "best_epoch"

    def _find(self, epoch: int) -> bool:
        """Take the best parameters of the run that is resumed; return whether there are any."""
        if epoch == 0 or self._monitor.best in (-math.inf, math.inf):
            return False
        try:
            with DistNadam.restore(
                self._place, num_shards=1, num_workers=1, replicas=0, backend="local"
            ) as found:
                self._best = found.get_params()
        except DistNadamError as error:
            log.warning("EarlyStopping: no parameters of epoch %d: %s", self.best_epoch, error)
            return False
        return True

    def _stop(self, epoch: int) -> None:
        self.stopped_epoch = epoch
        name, epochs = self._monitor.name, "epoch" if self._patience == 1 else "epochs"
        since = f"for {self._patience} {epochs}" if self._patience else f"in epoch {epoch}"
        self.run.stop(f"EarlyStopping: {name} has not improved {since}")
        if self._restores:
            self.run.optimizer.set_params(self._best)
        if self._verbose:
            log.warning(
                "Epoch %d: EarlyStopping; the best was epoch %d, with %s %g",
                epoch + 1,
                self.best_epoch + 1,
                name,
                self._monitor.best,
            )


class ModelCheckpoint(EpochCallback):
    """Saves a checkpoint of each epoch, or of the best one, in a directory of its own.

    `fit` saves and resumes by itself (`checkpoint_dir`, `save_every`); this is for a model to keep.
    ``DistNadam.restore(filepath)`` gives it back, on any number of shards.

    Args:
        filepath: the directory or URL, in which ``{epoch}``, from 1 as in Keras, and an epoch's
            logs may be named, as in ``"best/{epoch:03d}-{val_accuracy:.2f}"``. It gets a
            ``step_...`` in it.
        monitor: a name in an epoch's logs.
        verbose: 1 logs each save.
        save_best_only: whether only an epoch that is better than all before it is saved; in one
            directory the one before is removed.
        save_weights_only: a checkpoint always holds the slots too; True is refused.
        mode: "min", "max" or "auto".
        save_freq: only "epoch"; by steps, `fit` saves.
        initial_value_threshold: what the first must surpass, with `save_best_only`.

    >>> callback = ModelCheckpoint("best", monitor="val_accuracy", save_best_only=True)
    """

    def __init__(
        self,
        filepath: str | Path,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
    ) -> None:
        if save_freq != "epoch":
            raise ConfigError(
                f'ModelCheckpoint: save_freq must be "epoch", got {save_freq!r}: for every so many '
                f"steps give fit(save_every={save_freq!r})"
            )
        if save_weights_only:
            raise ConfigError(
                "ModelCheckpoint: save_weights_only=True: a checkpoint holds the slots too; "
                "`distnadam export` writes the parameters alone"
            )
        self._path = str(filepath)
        self._verbose = verbose
        self._best_only = save_best_only
        self._monitor = Monitor(monitor, mode, 0.0, self)
        if initial_value_threshold is not None:
            self._monitor.best = initial_value_threshold

    @property
    def best(self) -> float:
        """The best value so far; an infinite one, or the threshold, before the first."""
        return self._monitor.best

    @override
    def state(self) -> dict[str, Any]:
        return super().state() | {"best": self.best}

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._monitor.best = float(state["best"])

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = logs or {}
        if self._best_only and not self._monitor.improves(self._monitor.value_in(logs)):
            return
        try:
            path = self._path.format(epoch=epoch + 1, **logs)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"ModelCheckpoint: filepath={self._path!r} names {error}; an epoch has epoch, "
                f"{', '.join(sorted(logs))}"
            ) from error
        saved = self.run.save(path)
        if self._best_only:
            store.prune(path, 1, saved)
        if self._verbose:
            log.warning("Epoch %d: ModelCheckpoint saved %s", epoch + 1, saved)
