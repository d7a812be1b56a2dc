"""The optimizers' classes for Keras 3, each with the arguments of Keras's own of its formula."""

from typing import Any, ClassVar

import keras

from distnadam.errors import ConfigError
from distnadam.hyperparameters import Formula
from distnadam.keras.base import DistOptimizer

_registered = keras.saving.register_keras_serializable(package="distnadam")


@_registered
class DistNadam(DistOptimizer):
    """Nadam, as `keras.optimizers.Nadam` computes it; the arguments are `DistOptimizer`'s.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(DistNadam(learning_rate=0.05), loss="mse", jit_compile=False)
    >>> history = model.fit(np.ones((8, 2)), np.ones(8), epochs=2, verbose=0)
    >>> int(model.optimizer.iterations)
    2
    """


@_registered
class DistNadamW(DistOptimizer):
    """Nadam with decoupled weight decay, 0.004 as in `keras.optimizers.AdamW`.

    >>> DistNadamW(0.01).weight_decay
    0.004
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = 0.004,
        *arguments: Any,
        **others: Any,
    ) -> None:
        _require_decay(type(self).__name__, weight_decay)
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay, *arguments, **others)


@_registered
class DistAdam(DistOptimizer):
    """Adam, as `keras.optimizers.Adam` computes it; `amsgrad` is refused.

    >>> variable = keras.Variable(np.ones(2, np.float32))
    >>> DistAdam(0.1).apply([np.ones(2, np.float32)], [variable])
    >>> [round(float(value), 4) for value in keras.ops.convert_to_numpy(variable.value)]
    [0.9, 0.9]
    """

    _FORMULA: ClassVar[Formula] = "adam_keras"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        *arguments: Any,
        **others: Any,
    ) -> None:
        if amsgrad:
            raise ConfigError(
                "amsgrad=True: the largest second moment so far would be another slot, which the "
                "shards do not keep"
            )
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay, *arguments, **others)


@_registered
class DistAdamW(DistAdam):
    """Adam with decoupled weight decay, as `keras.optimizers.AdamW` computes it.

    >>> DistAdamW(learning_rate=0.01, weight_decay=0.1).weight_decay
    0.1
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float | None = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        *arguments: Any,
        **others: Any,
    ) -> None:
        _require_decay(type(self).__name__, weight_decay)
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, *arguments, **others
        )


def _require_decay(name: str, weight_decay: float | None) -> None:
    """Refuse None, as Keras's AdamW does; the class without W decays nothing."""
    if weight_decay is None:
        raise ConfigError(f"weight_decay must be a float in {name}, got None; use {name[:-1]}")
