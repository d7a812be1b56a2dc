"""The clocks of torch's tensors, `step` and NAdam's `mu_product`, to and from ours.

Where all are equal but for rounding, they are the optimizer's clock; else each tensor has its own.
Steps that differ then mean ``clocks="tensor"``, and our iterations are the most of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from distnadam.errors import CheckpointError, ConversionError
from distnadam.groups import groups_of
from distnadam.hyperparameters import NadamConfig
from distnadam.interop.formulas import is_adam
from distnadam.interop.optimizer_state import read_array
from distnadam.nadam.step_scalars import TensorClock, TensorClocks
from distnadam.tensors.arrays import Array
from distnadam.tensors.layout import Layout

_ROUNDING = 1e-5
"""Of products of as many coefficients, as float32 and float64 have them, relative to them."""


def clock_state(clock: TensorClock, config: NadamConfig) -> dict[str, Any]:
    """Return what torch has of one tensor's clock."""
    import torch

    step = {"step": torch.tensor(float(clock.steps), dtype=torch.float32)}
    if is_adam(config):
        return step
    return step | {"mu_product": torch.tensor(clock.product, dtype=torch.float64)}


def clocks_in(
    where: str, states: Mapping[str, Any], layout: Layout, config: NadamConfig, *, given: bool
) -> tuple[NadamConfig, TensorClock, TensorClocks | None]:
    """Return the config, with a clock a tensor where steps differ; the optimizer's clock; and the
    tensors' own, where they differ.

    Args:
        where: begins every message.
        states: torch's, by tensor; the others are at their beginning.
        layout: the tensors.
        config: the hyper-parameters.
        given: whether its `clocks` were asked for.

    Raises:
        CheckpointError: a tensor has no such numbers.
        ConversionError: steps differ, and one clock was asked for.
    """
    clocks = _by_tensor(where, states, config)
    if len({at.steps for at in clocks.values()}) > 1 and config.clocks == "one":
        if given:
            least, most = (pick(clocks, key=lambda n: clocks[n].steps) for pick in (min, max))
            raise ConversionError(
                f"{where}: step of {least!r} is {clocks[least].steps}, of {most!r} "
                f"{clocks[most].steps}: with clocks='one' all tensors step at every step"
            )
        config = replace(config, clocks="tensor")
    tensors = None
    if len(set(clocks.values())) > 1:
        at = (clocks.get(tensor.path, TensorClock()) for tensor in layout.tensors)
        tensors = TensorClocks.of(at)
    return config, _of_all(clocks, layout, config), tensors


def _by_tensor(
    where: str, states: Mapping[str, Any], config: NadamConfig
) -> dict[str, TensorClock]:
    """Return each tensor's clock, those that are equal but for rounding as the one of most digits.

    Raises:
        CheckpointError: a tensor has no such numbers.
    """
    alike: dict[int, list[list[tuple[str, Array]]]] = {}  # by steps, those of one product
    for name, state in states.items():
        steps, product = _clock_in(f"{where}: optimizer: {name!r}", state, config)
        for known in alike.setdefault(steps, []):
            if np.isclose(product, known[0][1], rtol=_ROUNDING, atol=0.0):
                known.append((name, product))
                break
        else:
            alike[steps].append([(name, product)])
    found: dict[str, TensorClock] = {}
    for steps, products in alike.items():
        for known in products:
            best = max((product for _, product in known), key=lambda value: value.dtype.itemsize)
            found |= {name: TensorClock(steps, float(best)) for name, _ in known}
    return {name: found[name] for name in states}


def _clock_in(where: str, state: Mapping[str, Any], config: NadamConfig) -> tuple[int, Array]:
    """Return the steps and the product of one tensor's state; 0 and 1 where it has none."""
    if not state:
        return 0, np.ones(())
    steps = read_array(f"{where}: step", state["step"])
    product = np.ones(()) if is_adam(config) else read_array(where, state["mu_product"])
    if any(value.shape != () or value.dtype.kind not in "fiu" for value in (steps, product)):
        raise CheckpointError(f"{where}: expected one number of steps, and one mu_product")
    if not 0 <= steps < 2**53 or steps != int(steps) or not 0.0 <= product <= 1.0:
        raise CheckpointError(
            f"{where}: expected a whole number of steps and a product of momentum coefficients, in "
            f"[0, 1], got {steps} and {product}"
        )
    return int(steps), product


def _of_all(clocks: Mapping[str, TensorClock], layout: Layout, config: NadamConfig) -> TensorClock:
    """Return the optimizer's clock: that of a tensor of most steps, whose beta_1 is the
    optimizer's if one of them has that.
    """
    names = [tensor.path for tensor in layout.tensors]
    own = {
        name
        for name, number in zip(names, groups_of(config.groups, names), strict=True)
        if number >= 0 and config.groups[number].beta_1 is not None
    }
    most = max(clocks, key=lambda name: (clocks[name].steps, name not in own), default=None)
    return TensorClock() if most is None else clocks[most]
