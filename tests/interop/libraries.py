"""The real libraries' optimizers on one small model, and ours, for comparison."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distnadam import DistNadam

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

NAMES = ["bias", "kernel", "scale"]
STEPS = 10
Params = dict[str, np.ndarray]


def params() -> Params:
    rng = np.random.default_rng(5)
    return {
        "bias": rng.standard_normal(7).astype(np.float32),
        "kernel": rng.standard_normal((11, 7)).astype(np.float32),
        "scale": np.float32(1.5),
    }


def gradients(step: int) -> Params:
    rng = np.random.default_rng([6, step])
    return {
        name: np.asarray(rng.standard_normal(np.shape(p)) * 10.0 ** (step % 3 - 1), np.float32)
        for name, p in params().items()
    }


def trained(tmp_path: Path, steps: int = 25, **config: Any) -> str:
    """Return a checkpoint after some steps of ours."""
    with DistNadam(**{"lr": 0.01, **config}, backend="local").build(params()) as optimizer:
        for step in range(steps):
            optimizer.apply_gradients(gradients(step))
        return optimizer.save(tmp_path / "ours")


def go_on_here(checkpoint: str, begin: int) -> tuple[Params, DistNadam]:
    optimizer = DistNadam.restore(checkpoint, backend="local", num_shards=2)
    for step in range(begin, begin + STEPS):
        optimizer.apply_gradients(gradients(step))
    return optimizer.get_params(), optimizer


def close(theirs: Sequence[Any], ours: Sequence[Any], *, rel: float = 2**-21) -> None:
    """Assert equality to four units in the last place of each tensor's largest magnitude."""
    for given, expected in zip(theirs, ours, strict=True):
        scale = np.abs(expected).max()
        assert np.abs(np.asarray(given, np.float64) - expected).max() <= rel * scale


def in_names(tree: Params) -> list[np.ndarray]:
    return [np.asarray(tree[name]) for name in NAMES]


class Torch:
    """A class of torch.optim on tensors of ours."""

    def __init__(self, start: Params, kind: str = "NAdam", **config: Any) -> None:
        import torch

        self.torch = torch
        self.tensors = {
            name: torch.nn.Parameter(torch.tensor(np.array(value))) for name, value in start.items()
        }
        self.optimizer = getattr(torch.optim, kind)(list(self.tensors.items()), **config)

    def run(self, begin: int, end: int) -> Params:
        for step in range(begin, end):
            for name, gradient in gradients(step).items():
                self.tensors[name].grad = self.torch.tensor(gradient)
            self.optimizer.step()
        return {name: tensor.detach().numpy() for name, tensor in self.tensors.items()}


class TfKerasLegacy:
    """tf_keras.optimizers.legacy.Nadam."""

    def __init__(self, start: Params, **config: Any) -> None:
        import tensorflow as tf
        import tf_keras

        self.tf = tf
        self.variables = {name: tf.Variable(value, name=name) for name, value in start.items()}
        self.optimizer = tf_keras.optimizers.legacy.Nadam(**config)

    def load(self, weights: list[np.ndarray]) -> None:
        zeros = [(self.tf.zeros_like(v), v) for v in self.variables.values()]
        kept = {name: v.numpy() for name, v in self.variables.items()}
        self.optimizer.apply_gradients(zeros)  # creates the slots
        for name, value in kept.items():
            self.variables[name].assign(value)
        self.optimizer.set_weights(weights)

    def run(self, begin: int, end: int) -> Params:
        for step in range(begin, end):
            found = gradients(step)
            self.optimizer.apply_gradients(
                [(self.tf.constant(found[name]), v) for name, v in self.variables.items()]
            )
        return {name: v.numpy() for name, v in self.variables.items()}


class Keras3:
    """A class of keras.optimizers of Keras 3, on JAX, and what is done to a gradient before."""

    def __init__(
        self, start: Params, kind: str = "Nadam", before: Any = None, **config: Any
    ) -> None:
        import keras as real

        self.variables = {name: real.Variable(value, name=name) for name, value in start.items()}
        self.before = before or (lambda gradient, variable: gradient)
        self.optimizer = getattr(real.optimizers, kind)(**config)
        self.optimizer.build(list(self.variables.values()))

    def load(self, values: list[np.ndarray]) -> None:
        for variable, value in zip(self.optimizer.variables, values, strict=True):
            variable.assign(value)

    def entries(self) -> dict[str, np.ndarray]:
        """Return what a user puts into an npz file."""
        values = [np.asarray(v.value) for v in self.optimizer.variables]
        found = {f"params/{name}": np.asarray(v.value) for name, v in self.variables.items()}
        return found | {f"optimizer/{i:05d}": value for i, value in enumerate(values)}

    def run(self, begin: int, end: int) -> Params:
        for step in range(begin, end):
            found = gradients(step)
            self.optimizer.apply(
                [
                    self.before(found[name], np.asarray(v.value))
                    for name, v in self.variables.items()
                ]
            )
        return {name: np.asarray(v.value) for name, v in self.variables.items()}


class Optax:
    """A function of optax, and the transformations before it."""

    def __init__(self, start: Params, kind: str = "nadam", before: Any = (), **config: Any) -> None:
        import jax.numpy as jnp
        import optax

        steps = [getattr(optax, name)(*arguments) for name, *arguments in before]
        self.optimizer = optax.chain(*steps, getattr(optax, kind)(**config))
        self.apply_updates = optax.apply_updates
        self.params = {name: jnp.asarray(value) for name, value in start.items()}
        self.state = self.optimizer.init(self.params)

    def run(self, begin: int, end: int) -> Params:
        for step in range(begin, end):
            updates, self.state = self.optimizer.update(gradients(step), self.state, self.params)
            self.params = self.apply_updates(self.params, updates)
        return {name: np.asarray(value) for name, value in self.params.items()}

    def entries(self) -> dict[str, np.ndarray]:
        """Return what a user puts into an npz file."""
        import optax

        found = {
            f"{slot}/{name}": np.asarray(value)
            for slot in ("mu", "nu")
            for name, value in optax.tree_utils.tree_get(self.state, slot).items()
        }
        found |= {f"params/{name}": np.asarray(value) for name, value in self.params.items()}
        return found | {"count": np.asarray(optax.tree_utils.tree_get(self.state, "count"))}
