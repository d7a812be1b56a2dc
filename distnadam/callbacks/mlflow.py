"""MLflow's callback, as `mlflow.keras` has it. mlflow is imported here alone, when a run begins."""

from typing import Any

from typing_extensions import override

from distnadam.callbacks.epochs import EpochCallback, Logs
from distnadam.errors import TrainingError
from distnadam.extras import how_to_install


class MlflowCallback(EpochCallback):
    """Logs a run's configuration and metrics to MLflow: to the active run, or to one of its own.

    Args:
        log_every_epoch: whether to log at the end of each epoch.
        log_every_n_steps: logs loss and learning rate every so many steps, in place of epochs.
        run: an MLflow run to log to; None means the active one, or a new one that ends with the
            training.

    >>> callback = MlflowCallback(log_every_epoch=True)
    """

    def __init__(
        self,
        log_every_epoch: bool = True,
        log_every_n_steps: int | None = None,
        *,
        run: Any = None,
    ) -> None:
        self._given = run
        self._every_epoch = log_every_epoch and log_every_n_steps is None
        self._every_steps = log_every_n_steps
        self._mlflow: Any = None
        self._run_id: str | None = None
        self._is_ours = False

    @override
    def on_train_begin(self, logs: Logs | None = None) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise TrainingError(
                f"MlflowCallback needs the package mlflow: {how_to_install('mlflow')}"
            ) from error
        self._mlflow = mlflow
        active = self._given or mlflow.active_run()
        if active is None:
            active = mlflow.start_run(run_name=self.run.directory.name)
            self._is_ours = True
        self._run_id = active.info.run_id
        config = {"task": self.run.task, "steps": self.run.steps, **self.run.optimizer.get_config()}
        config.pop("options", None)
        mlflow.log_params({name: str(value) for name, value in config.items()}, run_id=self._run_id)

    @override
    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if self._every_steps and (batch + 1) % self._every_steps == 0:
            self._mlflow.log_metrics(logs or {}, step=batch + 1, run_id=self._run_id)

    @override
    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if self._every_epoch:
            self._mlflow.log_metrics(logs or {}, step=epoch, run_id=self._run_id)

    @override
    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._is_ours:
            self._mlflow.end_run()
            self._is_ours = False
