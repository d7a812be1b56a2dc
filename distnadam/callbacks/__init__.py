"""Callbacks for `fit`, with the names and arguments that Keras gives them.

A run of `fit` has steps and no epochs; here an epoch is what lies between two evaluations, so
``fit(..., evaluate_every=100)`` has one every 100 steps. Its logs are `loss`, the mean over its
steps, `learning_rate`, and what the task's `evaluate` returns, as Keras names it: `val_accuracy`
for `accuracy`.

>>> from distnadam.callbacks import CSVLogger, EarlyStopping
>>> class Mean:
...     def init(self, seed):
...         return {"w": np.zeros(2, np.float32)}
...     def batch(self, step, rank, world_size):
...         return np.float32([1.0, 1.0 + rank])
...     def loss_and_gradients(self, params, batch):
...         error = params["w"] - batch
...         return float(error @ error), {"w": 2 * error}
...     def evaluate(self, params):
...         return {"largest": float(params["w"].max())}
>>> stop = EarlyStopping(monitor="val_largest", mode="max", min_delta=0.5, patience=2)
>>> history = fit(Mean(), steps=40, evaluate_every=10, backend="local", verbose=False,
...     checkpoint_dir="runs/stopped", callbacks=[CSVLogger("epochs.csv"), stop])
>>> history.outcome, stop.stopped_epoch
('stopped: EarlyStopping: val_largest has not improved for 2 epochs', 2)
"""

from distnadam.callbacks.csv_logger import CSVLogger
from distnadam.callbacks.epochs import EpochCallback, LambdaCallback
from distnadam.callbacks.learning_rate import LearningRateScheduler, ReduceLROnPlateau
from distnadam.callbacks.mlflow import MlflowCallback
from distnadam.callbacks.stopping import EarlyStopping, ModelCheckpoint, TerminateOnNaN
from distnadam.callbacks.tensorboard import TensorBoard
from distnadam.callbacks.wandb import WandbMetricsLogger
from distnadam.training.callbacks import Callback

__all__ = [
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "EpochCallback",
    "LambdaCallback",
    "LearningRateScheduler",
    "MlflowCallback",
    "ModelCheckpoint",
    "ReduceLROnPlateau",
    "TensorBoard",
    "TerminateOnNaN",
    "WandbMetricsLogger",
]
