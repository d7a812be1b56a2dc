"""`DistNadam` with the defaults of other optimizers that the same kernel computes."""

from typing import Any

from distnadam.hyperparameters import DEFAULT_SCHEDULE_DECAY, Formula
from distnadam.optimizer import DistNadam
from distnadam.schedules import Rate


class DistNadamW(DistNadam):
    """Nadam with decoupled weight decay, as torch's ``NAdam(decoupled_weight_decay=True)``.

    All arguments are `DistNadam`'s; the default of `weight_decay` is 0.01.

    >>> import numpy as np
    >>> with DistNadamW(lr=0.1, weight_decay=0.5, backend="local") as optimizer:
    ...     _ = optimizer.build({"w": np.ones(2, np.float32)})
    ...     _ = optimizer.apply_gradients({"w": np.zeros(2, np.float32)})
    ...     optimizer.get_params()["w"].tolist()
    [0.949999988079071, 0.949999988079071]
    """

    def __init__(
        self,
        lr: Rate = 0.002,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float | None = None,
        schedule_decay: float = DEFAULT_SCHEDULE_DECAY,
        *,
        weight_decay: float = 0.01,
        **others: Any,
    ) -> None:
        super().__init__(
            lr, beta_1, beta_2, epsilon, schedule_decay, weight_decay=weight_decay, **others
        )


class DistAdam(DistNadam):
    """Adam, as torch and optax compute it.

    All arguments are `DistNadam`'s; the defaults are ``lr=0.001`` and ``formula="adam"``. The
    momentum is constant, so a `schedule_decay` is refused.

    >>> import numpy as np
    >>> with DistAdam(backend="local") as optimizer:
    ...     _ = optimizer.build({"w": np.ones(2, np.float32)})
    ...     _ = optimizer.apply_gradients({"w": np.ones(2, np.float32)})
    ...     optimizer.get_params()["w"].tolist()
    [0.9990000128746033, 0.9990000128746033]
    """

    def __init__(
        self,
        lr: Rate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float | None = None,
        schedule_decay: float = DEFAULT_SCHEDULE_DECAY,
        *,
        formula: Formula = "adam",
        **others: Any,
    ) -> None:
        super().__init__(lr, beta_1, beta_2, epsilon, schedule_decay, formula=formula, **others)


class DistAdamW(DistAdam):
    """Adam with decoupled weight decay, as torch's AdamW.

    All arguments are `DistNadam`'s; the defaults are ``lr=0.001``, ``formula="adam"`` and
    ``weight_decay=0.01``.

    >>> import numpy as np
    >>> from distnadam import Group
    >>> with DistAdamW(weight_decay=0.5, groups=[Group("b", weight_decay=0.0)]) as optimizer:
    ...     _ = optimizer.build({"b": np.ones(1), "w": np.ones(1)})
    ...     _ = optimizer.apply_gradients({"b": np.zeros(1), "w": np.zeros(1)})
    ...     optimizer.get_params()
    {'b': array([1.]), 'w': array([0.9995])}
    """

    def __init__(
        self,
        lr: Rate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float | None = None,
        schedule_decay: float = DEFAULT_SCHEDULE_DECAY,
        *,
        weight_decay: float = 0.01,
        **others: Any,
    ) -> None:
        super().__init__(
            lr, beta_1, beta_2, epsilon, schedule_decay, weight_decay=weight_decay, **others
        )
