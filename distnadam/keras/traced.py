"""A step that JAX has compiled into a model's train step: an ordered callback to the host.

The callback gets the parameters too, so that the host sees what was changed between two steps. The
host's work is done by one thread of its own, since those of XLA flush denormals.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import io_callback

from distnadam.frontends.host_thread import host_thread


def stepped(
    on_host: Callable[..., list[Any]],
    count: Any,
    rate: Any,
    values: Sequence[Any],
    gradients: Sequence[Any],
    where: Any = None,
) -> list[Any]:
    """Return the new parameters, once the host has stepped.

    Args:
        on_host: gets the next four arguments as arrays, and returns the new parameters.
        count: apply calls so far.
        rate: the learning rate.
        values: the parameters.
        gradients: one for each, or None.
        where: a traced bool; where it is False at run time, the host is not asked, and the
            parameters stay. None: always.
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]

    host = host_thread()

    def call(count: Any, rate: Any, values: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        every: list[Any] = [None] * len(values)
        for index, gradient in zip(present, given, strict=True):
            every[index] = gradient
        return host.submit(on_host, count, rate, values, every).result()

    def step() -> list[Any]:
        given = [gradients[index] for index in present]
        new: list[Any] = io_callback(call, shapes, count, rate, values, given, ordered=True)
        return new

    if where is None:
        return step()
    chosen: list[Any] = jax.lax.cond(where, step, lambda: list(values))
    return chosen
