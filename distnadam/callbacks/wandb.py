"""Weights & Biases' callback, as `wandb.integration.keras` has it. wandb is imported here alone,
when a run begins.
"""

import os
from typing import Any

from typing_extensions import override

from distnadam.callbacks.epochs import EpochCallback, Logs
from distnadam.errors import ConfigError, TrainingError
from distnadam.extras import how_to_install


class WandbMetricsLogger(EpochCallback):
    """Logs metrics to the run of `wandb.init`, or to one of its own: offline, in the training run's
    directory, unless WANDB_MODE says otherwise.

    Args:
        log_freq: "epoch", "batch", or a number of steps.
        initial_global_step: added to the steps of batches.

    >>> callback = WandbMetricsLogger(log_freq="epoch")
    """

    def __init__(self, log_freq: int | str = "epoch", initial_global_step: int = 0) -> None:
        every = {"epoch": 0, "batch": 1}.get(log_freq) if isinstance(log_freq, str) else log_freq
        if not isinstance(every, int) or every < 0:
            raise ConfigError(
                'WandbMetricsLogger: log_freq must be "epoch", "batch" or a number of steps, got '
                f"{log_freq!r}"
            )
        self._every = every
        self._first = initial_global_step
        self._run: Any = None
        self._is_ours = False

    @override
    def on_train_begin(self, logs: Logs | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrainingError(
                f"WandbMetricsLogger needs the package wandb: {how_to_install('wandb')}"
            ) from error
        self._run = wandb.run
        if self._run is None:
            self._run = wandb.init(
                project="distnadam",
                name=self.run.directory.name,
                dir=str(self.run.directory),
                mode=os.environ.get("WANDB_MODE", "offline"),
            )
            self._is_ours = True
        config = self.run.optimizer.get_config()
        self._run.config.update(
            {"task": self.run.task, "steps": self.run.steps, "optimizer": config}
        )
        if self._every:
            self._run.define_metric("batch/batch_step")
            self._run.define_metric("batch/*", step_metric="batch/batch_step")
        self._run.define_metric("epoch/epoch")
        self._run.define_metric("epoch/*", step_metric="epoch/epoch")

    @override
    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if self._every and (batch + 1) % self._every == 0:
            named = {f"batch/{name}": value for name, value in (logs or {}).items()}
            self._run.log({"batch/batch_step": self._first + batch + 1, **named})

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        named = {f"epoch/{name}": value for name, value in (logs or {}).items()}
        self._run.log({"epoch/epoch": epoch, **named})

    @override
    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._is_ours:
            self._run.finish()
            self._is_ours = False
