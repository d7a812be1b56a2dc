"""optax.nadam, which has no momentum schedule: mu_t is beta_1, the product of the mu_t beta_1 ** t.

That is our formula in the limit of a large schedule_decay, so an import is exact (`NO_SCHEDULE`).
An export is exact only once our schedule has decayed and the products agree, and is refused
otherwise. optax's `count`, `mu` and `nu` are our iterations, m and v.

A file is an npz: ``params/<path>``, ``mu/<path>``, ``nu/<path>``, ``count``, and the description
`about` with nadam's arguments. A user's file without `about` is accepted too; `config` must then be
given.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.errors import CheckpointError, ConversionError
from distnadam.interop.formulas import (
    NO_SCHEDULE,
    Conversion,
    find_count,
    find_momentum,
    find_outside,
    find_product,
    unscheduled,
)
from distnadam.interop.npz import expect_kind, group, read_npz, settings_of, write_npz
from distnadam.interop.optimizer_state import (
    OptimizerState,
    layout_of,
    make_config,
    make_state,
    read_layout,
)

_SLOTS = {"params": "params", "m": "mu", "v": "nu"}
_SPELLING = {"learning_rate": "lr", "b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
_LACKING = {"eps_root": 0, "weight_decay": 0}


def config(state: OptimizerState) -> dict[str, Any]:
    """Return the arguments of optax.nadam, whose default for eps is 1e-8."""
    ours = state.config
    return {"learning_rate": state.rate, "b1": ours.beta_1, "b2": ours.beta_2, "eps": ours.epsilon}


def opt_state(state: OptimizerState, like: Any, *, lossy: bool = False) -> Any:
    """Return an optimizer state that optax.nadam continues from.

    Args:
        state: a loaded checkpoint.
        like: the result of `optax.nadam(...).init(params)`, or of a chain with one, for params in
            the checkpoint's structure.
        lossy: return it even if optax.nadam would train on differently.

    Raises:
        ConversionError: naming each difference; or optax is not installed.
    """
    job = Conversion(Path("optax.nadam"), lossy=lossy)
    _compare(state, job)
    job.settle()
    try:
        import jax.numpy as jnp
        import optax
    except ImportError as error:
        raise ConversionError(
            "optax is not installed, and its states need it: pip install 'distnadam[optax]'"
        ) from error
    trees = {
        theirs: state.layout.unflatten([jnp.asarray(array) for array in getattr(state, ours)])
        for ours, theirs in _SLOTS.items()
        if ours != "params"
    }
    return optax.tree_utils.tree_set(
        like, count=jnp.asarray(state.clock.iterations, jnp.int32), **trees
    )


def write(state: OptimizerState, job: Conversion) -> None:
    """Write the state of optax.nadam beside the parameters."""
    _compare(state, job)
    find_outside(job, state, "optax.nadam")
    job.settle()
    arrays = {
        f"{theirs}/{state.names[i]}": getattr(state, ours)[i]
        for ours, theirs in _SLOTS.items()
        for i in state.positions(job.order)
    }
    arrays["count"] = np.array(state.clock.iterations, np.int32)
    write_npz(
        job.path,
        arrays,
        {"kind": "optax", "config": config(state), "layout": state.layout.to_dict()},
    )


def read(job: Conversion) -> OptimizerState:
    """Return the state of a file with optax.nadam's state."""
    where = str(job.path)
    arrays, about = read_npz(job.path)
    expect_kind(job.path, about, "optax")
    slots = {ours: group(arrays, theirs) for ours, theirs in _SLOTS.items()}
    if "count" not in arrays or sum(map(len, slots.values())) + 1 != len(arrays):
        raise CheckpointError(
            f"{where}: expected entries params/, mu/, nu/ and count, got "
            f"{', '.join(list(arrays)[:5])}"
        )
    values = {
        "epsilon": 1e-8,
        **_ours(job, settings_of(where, about)),
        "schedule_decay": NO_SCHEDULE,
        **_ours(job, job.config),
    }
    if "lr" not in values:
        raise CheckpointError(
            f"{where}: holds no configuration; give config with nadam's learning_rate"
        )
    layout = (
        read_layout(where, about["layout"])
        if "layout" in about
        else layout_of(where, slots["params"])
    )
    settings = make_config(where, values)
    state = make_state(where, layout, settings, (arrays["count"], 1.0), slots)
    return replace(state, clock=unscheduled(settings, state.clock.iterations))


def _compare(state: OptimizerState, job: Conversion) -> None:
    find_momentum(job, state, math.inf, "optax.nadam has no momentum schedule")
    find_product(job, state, "optax.nadam")
    find_count(job, state, 2**31 - 1, "optax's int32 count")


def _ours(job: Conversion, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return nadam's arguments in our spelling; add a difference for each that we lack."""
    values = {_SPELLING.get(name, name): value for name, value in given.items()}
    for name, harmless in _LACKING.items():
        value = values.pop(name, harmless)
        if value != harmless:
            job.differences.append(f"{name}: {value!r} there, and distnadam has none")
    return values
