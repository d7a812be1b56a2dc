"""Scales of the loss in half precision: Keras's own wrapper, and that of the shards. No shards."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from distnadam.errors import ConfigError
from distnadam.tensors.leaves import as_numpy


def refuse_wrapper(num_workers: int, *, is_scaled: bool) -> None:
    """Raise ConfigError where a LossScaleOptimizer cannot take the scaling over.

    Args:
        num_workers: how many ranks there are.
        is_scaled: whether the shards keep a scale.
    """
    if is_scaled:
        raise ConfigError(
            "LossScaleOptimizer would scale what loss_scale scales already: give model.compile "
            "auto_scale_loss=False"
        )
    if num_workers > 1:
        raise ConfigError(
            f"LossScaleOptimizer skips steps on the rank that overflowed alone, and the other "
            f"{num_workers - 1} would wait for it: give model.compile auto_scale_loss=False, and "
            "this optimizer loss_scale=distnadam.LossScale(), which skips on all ranks"
        )


def refuse_compiled() -> None:
    """Raise ConfigError for a scale of the shards in a train step that JAX compiles."""
    raise ConfigError(
        "loss_scale is another from step to step, and JAX would compile that of the first into "
        "all: give model.compile run_eagerly=True; in a loop of your own, scale the loss and apply "
        "the gradients outside of jax.jit"
    )


def scaled(loss: Any, scale: float) -> Any:
    """Return a loss times a scale of the shards.

    Raises:
        ConfigError: JAX compiles what the loss is part of; one of which it only takes the gradient
            has a number already.
    """
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(loss, jax.core.Tracer):
        try:
            float(jax.lax.stop_gradient(loss))
        except jax.errors.ConcretizationTypeError:
            refuse_compiled()
    return loss * scale


def rescaled(gradients: Sequence[Any], before: float, now: float) -> Sequence[Any]:
    """Return gradients of losses times one scale as those of losses times another."""
    if before == now:
        return gradients
    factor = np.float32(now / before)
    return [None if each is None else as_numpy(each) * factor for each in gradients]
