"""A step that JAX has compiled into a model's train step: a callback to the host, which gets the
parameters too, so that the host sees what was changed between two steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from distnadam.frontends.host_calls import HostCalls

__all__ = ["HostCalls", "stepped"]


def stepped(
    calls: HostCalls,
    on_host: Callable[..., list[Any]],
    count: Any,
    rate: Any,
    values: Sequence[Any],
    gradients: Sequence[Any],
    where: Any = None,
) -> list[Any]:
    """Return the new parameters, once the host has stepped.

    Args:
        calls: the optimizer's.
        on_host: gets the next four arguments as arrays, and returns the new parameters.
        count: apply calls so far.
        rate: the learning rate.
        values: the parameters.
        gradients: one for each, or None.
        where: a traced bool; where it is False at run time, the host is not asked, and the
            parameters stay. None: always.
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]

    def call(count: Any, rate: Any, values: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        every: list[Any] = [None] * len(values)
        for index, gradient in zip(present, given, strict=True):
            every[index] = gradient
        return on_host(count, rate, values, every)

    def step() -> list[Any]:
        given = [gradients[index] for index in present]
        return calls.traced(call, values, count, rate, values, given)

    if where is None:
        return step()
    chosen: list[Any] = jax.lax.cond(where, step, lambda: list(values))
    return chosen
