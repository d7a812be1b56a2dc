"""Checkpoints of a Keras model and its cluster: a callback that saves, a function that goes on."""

from typing import Any, Literal

import keras
import numpy as np
from typing_extensions import override

from distnadam.checkpoint import store
from distnadam.checkpoint.storage.resolve import DirectoryLike
from distnadam.checks import check_count
from distnadam.errors import ConfigError, StructureError
from distnadam.frontends.replica import Slots
from distnadam.interop import load_checkpoint
from distnadam.keras.base import DistOptimizer
from distnadam.keras.variables import numpy_of
from distnadam.tensors.leaves import as_numpy

_KEY = "keras"


class ClusterCheckpoint(keras.callbacks.Callback):
    """Saves the shards' state during `fit`, and with it what the model does not train.

    Args:
        directory: where each checkpoint gets a directory ``step_<round>``; a path or an fsspec URL.
        save_freq: "epoch", or after how many batches.

    Raises:
        ConfigError: `save_freq` is neither; or the model has another optimizer.

    >>> from distnadam.keras import DistNadam
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(DistNadam(), loss="mse", jit_compile=False)
    >>> saves = ClusterCheckpoint("runs/saved")
    >>> history = model.fit(np.ones((8, 2)), np.ones(8), verbose=0, callbacks=[saves])
    >>> saves.last_saved.endswith("step_00000001")
    True
    """

    def __init__(
        self, directory: DirectoryLike, save_freq: int | Literal["epoch"] = "epoch"
    ) -> None:
        super().__init__()
        self.directory = directory
        self.save_freq = save_freq if save_freq == "epoch" else check_count("save_freq", save_freq)
        self.last_saved: str | None = None
        self._batches = 0

    @override
    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse an optimizer that has no shards."""
        optimizer_of(self.model)

    @override
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save after every `save_freq` batches."""
        self._batches += 1
        if self.save_freq != "epoch" and self._batches % self.save_freq == 0:
            self._save()

    @override
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save after each epoch."""
        if self.save_freq == "epoch":
            self._save()

    def _save(self) -> None:
        optimizer = optimizer_of(self.model)
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # what it does not train may be with the compiled step
        if optimizer.rank == 0:
            others = {f"{i}": numpy_of(v) for i, v in _others(self.model)}
            data = {_KEY: {"iteration": int(numpy_of(optimizer._iterations)), "others": others}}
            self.last_saved = optimizer.cluster.save(self.directory, data=data)


def restore(model: Any, path: DirectoryLike) -> None:
    """Have a compiled and built model go on where a checkpoint of `ClusterCheckpoint` stopped.

    Call it on every rank. Tensors are matched in order, since Keras numbers names anew.

    Args:
        model: its weights, and its optimizer's state, are replaced.
        path: one checkpoint, or a directory of them, whose newest valid one is taken.

    Raises:
        CheckpointError: naming the file that was refused, and why.
        StructureError: it is of another model; nothing was changed.

    >>> from distnadam.keras import DistNadam
    >>> def model_of():
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    ...     model.compile(DistNadam(), loss="mse", jit_compile=False)
    ...     return model
    >>> model, data = model_of(), (np.ones((8, 2)), np.ones(8))
    >>> history = model.fit(*data, verbose=0, callbacks=[ClusterCheckpoint("runs/restored")])
    >>> again = model_of()
    >>> restore(again, "runs/restored")
    >>> bool((again.get_weights()[0] == model.get_weights()[0]).all())
    True
    """
    optimizer = optimizer_of(model)
    optimizer.build(model.trainable_variables)
    state, variables = load_checkpoint(path), optimizer.stepped_variables
    order = state.positions(None)
    shapes = [state.params[i].shape for i in order]
    expected = [tuple(v.shape) for v in variables]
    if shapes != expected:
        raise StructureError(f"{path}: expected tensors of shapes {expected}, got {shapes}")
    data = store.find(path)[1].user_data.get(_KEY, {})
    others = dict(_others(model))
    kept = {int(index): array for index, array in data.get("others", {}).items()}
    if kept and kept.keys() != others.keys():
        raise StructureError(
            f"{path}: expected {len(others)} variables that are not trained, got {len(kept)}"
        )
    renamed = {state.names[i]: name for i, name in zip(order, optimizer.names, strict=True)}
    optimizer.load_slots(Slots.of(state).renamed(renamed))
    for i, variable in zip(order, variables, strict=True):
        variable.assign(state.params[i])
    for index, array in kept.items():
        others[index].assign(array)


def optimizer_of(model: Any) -> DistOptimizer:
    """Return a model's optimizer of ours, also one inside a LossScaleOptimizer.

    Raises:
        ConfigError: it has another.
    """
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, DistOptimizer):
        raise ConfigError(
            f"the model's optimizer must be one of distnadam.keras, got {optimizer!r}"
        )
    return optimizer


def _others(model: Any) -> list[tuple[int, Any]]:
    """Return a model's variables that are not trained and hold numbers, with their places."""
    variables = enumerate(model.non_trainable_variables)
    return [(i, v) for i, v in variables if np.dtype(str(as_numpy(v.value).dtype)).kind in "fiub"]
