"""tf_keras (Keras 2) and TensorFlow 2, eagerly: legacy optimizers whose state is on shards.

    optimizer = distnadam.tf_keras.DistNadam(learning_rate=1e-3)
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

In `model.compile` give `run_eagerly=True` too. They are subclasses of the legacy optimizer, whose
Nadam is the reference's formula; `get_weights` and `set_weights` have its list.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
import tf_keras
from typing_extensions import override

from distnadam.config import BackendName, Options
from distnadam.errors import ConfigError, StructureError
from distnadam.frontends.replica import Replica, Slots, distinct
from distnadam.hyperparameters import DEFAULT_SCHEDULE_DECAY, Formula
from distnadam.tensors.arrays import Array

__all__ = ["DistAdam", "DistAdamW", "DistNadam", "DistNadamW"]


class DistNadam(tf_keras.optimizers.legacy.Optimizer):
    """Nadam as `tf_keras.optimizers.legacy.Nadam`, and TensorFlow 1.13's, compute it.

    A gradient that is a `tf.IndexedSlices` counts as the dense one that it stands for, as in
    TensorFlow 1.13. A variable that has no gradient on any rank stands still, its clock too.
    Parameters that are changed between two steps are taken over.

    Args:
        learning_rate: a float, a `LearningRateSchedule`, or a callable without arguments.
        beta_1, beta_2, epsilon: as the legacy Nadam has them.
        schedule_decay: how fast the momentum schedule approaches beta_1.
        name: TensorFlow's name of this object.
        weight_decay: decoupled.
        clipnorm, clipvalue, global_clipnorm: clip the mean gradient of all ranks.
        num_shards, replicas, backend, options: as `distnadam.DistNadam` has them.
        num_workers, rank: how many processes train, and which this is; None finds it.
        cluster_name: `distnadam.DistNadam`'s name, by which ranks find each other; None is made
            from what started them.

    Raises:
        ConfigError: naming the argument and its value.

    >>> variable = tf.Variable([1.0, 1.0])
    >>> _ = DistNadam(learning_rate=0.1).apply_gradients([(tf.constant([1.0, 1.0]), variable)])
    >>> [round(float(value), 4) for value in variable.numpy()]
    [0.8944, 0.8944]
    """

    _FORMULA: ClassVar[Formula] = "nadam"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        schedule_decay: float = DEFAULT_SCHEDULE_DECAY,
        name: str | None = None,
        *,
        weight_decay: float = 0.0,
        num_shards: int = 1,
        num_workers: int | None = None,
        rank: int | None = None,
        replicas: int = 0,
        backend: BackendName = "auto",
        cluster_name: str | None = None,
        options: Options | Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(name or type(self).__name__, **others)
        self._set_hyper("learning_rate", others.get("lr", learning_rate))
        self._arguments = {
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
            "schedule_decay": schedule_decay,
            "weight_decay": weight_decay,
            "num_shards": num_shards,
            "replicas": replicas,
            "backend": backend,
            "options": Options.of(options).to_dict(),
        }
        self._asked = {"num_workers": num_workers, "rank": rank, "cluster_name": cluster_name}
        clips = ("clipnorm", "clipvalue", "global_clipnorm")
        settings = {clip: getattr(self, clip) for clip in clips} | {"name": cluster_name}
        settings |= {"formula": self._FORMULA, "clocks": "tensor"}
        self._replica = Replica(self._arguments | settings, rank, num_workers)
        self._stepped: list[Any] = []
        self._names: list[str] = []

    @override
    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> Any:
        """Push this rank's gradients, wait for the round, and assign the new parameters.

        The first call says which variables there are. After `Rewound` they are what the shards went
        back to.

        Returns:
            The number of calls so far, a variable.

        Raises:
            ConfigError: it is called in a graph.
            StructureError: a variable was not there at the first call.
            ValueError: no variable has a gradient.
            And as `distnadam.Worker.step`.
        """
        if not tf.executing_eagerly():
            raise ConfigError(
                "the shards step outside of graphs: call apply_gradients outside of tf.function, "
                "or give model.compile run_eagerly=True"
            )
        pairs = [(gradient, variable) for gradient, variable in grads_and_vars]
        if all(gradient is None for gradient, _ in pairs):
            raise ValueError("No gradients provided for any variable.")
        if not self._stepped:
            self._begin([variable for _, variable in pairs])
        by_variable = {variable.ref(): gradient for gradient, variable in pairs}
        odd = [v.deref().name for v in by_variable.keys() - {v.ref() for v in self._stepped}]
        if odd:
            raise StructureError(f"{odd[0]!r} was not among the variables of the first step")
        given = [_dense(by_variable.get(variable.ref())) for variable in self._stepped]
        params = self._params()
        rate = float(self._decayed_lr(tf.float32))
        if not self._replica.is_started:
            self._replica.start(params, lr=rate)
        gradients = dict(zip(self._names, given, strict=True))
        self._replica.step(params, gradients, self._assign, lr=rate)
        self.iterations.assign_add(1)
        return self.iterations

    @property
    def cluster(self) -> Any:
        """The `distnadam.DistNadam` whose shards hold the state, from the first step on."""
        return self._replica.optimizer

    def close(self) -> None:
        """Leave the cluster, and end it if this rank made it."""
        self._replica.close()

    @override
    def get_weights(self) -> list[Array]:
        """Return ``[iterations, m_schedule, *ms, *vs]``, for Adam without `m_schedule`; before the
        first step the count alone.
        """
        if not self._stepped:
            return [np.array(self.iterations.numpy())]
        slots = self._replica.slots(self._params())
        for tensor, found in slots.clocks.items():
            if found.steps != slots.iterations:
                raise ConfigError(
                    f"get_weights: {tensor!r} was stepped {found.steps} times, and the optimizer "
                    f"{slots.iterations} times: the list has one clock; save a checkpoint"
                )
        clock = [np.array(slots.iterations, np.int64), np.array(slots.m_schedule, np.float64)]
        listed = [np.array(each[name]) for each in (slots.m, slots.v) for name in self._names]
        return [*clock[: 1 + self._has_product], *listed]

    @override
    def set_weights(self, weights: Sequence[Any]) -> None:
        """Load what `get_weights` returned, here or of the legacy optimizer.

        Raises:
            StructureError: the variables are not known yet, or there are others.
        """
        if not self._stepped:
            raise StructureError(
                "set_weights: the variables are not known yet: call build(variables) first"
            )
        count, first = len(self._names), 1 + self._has_product
        if len(weights) != first + 2 * count:
            raise StructureError(
                f"set_weights: expected {first + 2 * count} arrays, got {len(weights)}"
            )
        arrays = [np.asarray(weight) for weight in weights]
        slots = Slots(
            iterations=int(arrays[0]),
            m_schedule=float(arrays[1]) if self._has_product else 1.0,
            m=dict(zip(self._names, arrays[first : first + count], strict=True)),
            v=dict(zip(self._names, arrays[first + count :], strict=True)),
            ema={},
        )
        self._replica.load(slots)
        self.iterations.assign(slots.iterations)

    def build(self, variables: Sequence[Any]) -> None:
        """Say which variables there are, before the first step; the shards start at that."""
        if not self._stepped:
            self._begin(list(variables))

    @override
    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        rate = self._serialize_hyperparameter("learning_rate")
        return {**super().get_config(), "learning_rate": rate, **self._arguments, **self._asked}

    @property
    def _has_product(self) -> bool:
        return self._FORMULA == "nadam"

    def _begin(self, variables: list[Any]) -> None:
        self._stepped = variables
        self._names = distinct([variable.name for variable in variables])

    def _assign(self, params: Mapping[str, Array]) -> None:
        for tensor, variable in zip(self._names, self._stepped, strict=True):
            variable.assign(np.array(params[tensor]))  # the shards overwrite what it is made of

    def _params(self) -> dict[str, Array]:
        values = [variable.numpy() for variable in self._stepped]
        return dict(zip(self._names, map(np.asarray, values), strict=True))


class DistNadamW(DistNadam):
    """Nadam with decoupled weight decay, 0.004 as in Keras's AdamW.

    >>> variable = tf.Variable([1.0, 1.0])
    >>> _ = DistNadamW(0.1, weight_decay=0.5).apply_gradients([(tf.constant([1.0, 1.0]), variable)])
    >>> [round(float(value), 4) for value in variable.numpy()]
    [0.8444, 0.8444]
    """

    def __init__(self, *arguments: Any, weight_decay: float = 0.004, **others: Any) -> None:
        super().__init__(*arguments, weight_decay=weight_decay, **others)


class DistAdam(DistNadam):
    """Adam as `tf_keras.optimizers.legacy.Adam` computes it.

    >>> variable = tf.Variable([1.0, 1.0])
    >>> _ = DistAdam(0.1).apply_gradients([(tf.constant([1.0, 1.0]), variable)])
    >>> [round(float(value), 4) for value in variable.numpy()]
    [0.9, 0.9]
    """

    _FORMULA: ClassVar[Formula] = "adam_keras"


class DistAdamW(DistAdam):
    """Adam with decoupled weight decay, 0.004 as in Keras's AdamW.

    >>> variable = tf.Variable([1.0, 1.0])
    >>> _ = DistAdamW(0.1, weight_decay=0.5).apply_gradients([(tf.constant([1.0, 1.0]), variable)])
    >>> [round(float(value), 4) for value in variable.numpy()]
    [0.85, 0.85]
    """

    def __init__(self, *arguments: Any, weight_decay: float = 0.004, **others: Any) -> None:
        super().__init__(*arguments, weight_decay=weight_decay, **others)


def _dense(gradient: Any) -> Array | None:
    return None if gradient is None else np.asarray(tf.convert_to_tensor(gradient).numpy())
