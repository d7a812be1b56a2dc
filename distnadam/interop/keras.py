"""Keras: the weights of the reference (TF 1.x, tf_keras legacy), and Keras 3's variables.

The reference's formula is ours. Keras 3's is ours with schedule_decay = 1, which it does not store;
its `_u_product` is our m_schedule. Both have one clock, so the whole state carries over. Neither
list holds the parameters, so a file stores them beside it. Keras is not imported.

A file is an npz: ``params/<path>``, ``optimizer/00000`` and on (the list), and the description
`about` with the framework's config. A user's file without `about` is accepted too: its list follows
the order of its params, and `config` must be given.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.errors import CheckpointError
from distnadam.interop.formulas import Conversion, find_count, find_momentum, find_outside
from distnadam.interop.npz import expect_kind, group, read_npz, settings_of, write_npz
from distnadam.interop.optimizer_state import (
    OptimizerState,
    layout_of,
    make_config,
    make_state,
    positions,
    read_layout,
)
from distnadam.tensors.arrays import Array

_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
_LACKING = {
    "weight_decay": 0,
    "use_ema": False,
    "gradient_accumulation_steps": 1,
    "loss_scale_factor": 1,
}
"""Settings of Keras that we lack, with the value at which they have no effect."""
_WITHOUT_EFFECT = {
    "name",
    "jit_compile",
    "is_legacy_optimizer",
    "ema_momentum",
    "ema_overwrite_frequency",
}
"""Settings of Keras that do not change a step."""


def weights(state: OptimizerState, order: Sequence[str] | None = None) -> list[Array]:
    """Return the list for the reference's `set_weights`: ``[iterations, m_schedule, *ms, *vs]``.

    Args:
        state: a loaded checkpoint.
        order: the tensors' paths in the order of the Keras optimizer's variables; None means the
            order given to `build`.
    """
    at = state.positions(order)
    clock = [
        np.array(state.clock.iterations, np.int64),
        np.array(state.clock.m_schedule, np.float64),
    ]
    return [*clock, *(state.m[i] for i in at), *(state.v[i] for i in at)]


def variables(
    state: OptimizerState, order: Sequence[str] | None = None, *, lossy: bool = False
) -> list[Array]:
    """Return the values to assign, one by one, to a built Keras 3 optimizer's `variables`.

    They are ``[iteration, learning_rate, m_0, v_0, m_1, v_1, ..., u_product]``.

    Args:
        state: a loaded checkpoint.
        order: as for `weights`.
        lossy: return them even if Keras 3 would train on differently.

    Raises:
        ConversionError: naming each difference.
    """
    job = Conversion(Path("keras.optimizers.Nadam"), lossy=lossy)
    _compare_with_keras_3(state, job)
    job.settle()
    slots = [array for i in state.positions(order) for array in (state.m[i], state.v[i])]
    clock = [np.array(state.clock.iterations, np.int32), np.array(state.rate, np.float32)]
    return [*clock, *slots, np.array(state.clock.m_schedule, np.float32)]


def config(state: OptimizerState) -> dict[str, Any]:
    """Return the reference's configuration; tf_keras legacy calls its `lr` `learning_rate`."""
    common = {"lr": state.rate, **_common(state)}
    return {**common, "schedule_decay": state.config.schedule_decay}


def config_of_keras_3(state: OptimizerState) -> dict[str, Any]:
    """Return the arguments of Keras 3's Nadam."""
    return {"learning_rate": state.rate, **_common(state)}


def write(state: OptimizerState, job: Conversion) -> None:
    """Write the reference's list beside the parameters."""
    find_outside(job, state, "the reference", clips=("clipnorm", "clipvalue"))
    _write(state, job, "keras", weights(state, job.order), config(state))


def write_keras_3(state: OptimizerState, job: Conversion) -> None:
    """Write Keras 3's variables beside the parameters."""
    _compare_with_keras_3(state, job)
    find_outside(job, state, "Keras 3", clips=_CLIPS)
    job.settle()
    _write(
        state, job, "keras3", variables(state, job.order, lossy=job.lossy), config_of_keras_3(state)
    )


def read(job: Conversion) -> OptimizerState:
    """Return the state of a file with the reference's list."""
    params, about, given = _read(job, "keras")
    count = len(params)
    if len(given) != 2 + 2 * count:
        raise CheckpointError(
            f"{job.path}: expected iterations, m_schedule and {2 * count} slots, got {len(given)} "
            "arrays"
        )
    slots = {"params": list(params.values()), "m": given[2 : 2 + count], "v": given[2 + count :]}
    return _state(job, about, list(params), (given[0], given[1]), slots, {})


def read_keras_3(job: Conversion) -> OptimizerState:
    """Return the state of a file with Keras 3's variables.

    They hold no learning rate if the optimizer had a schedule.
    """
    params, about, given = _read(job, "keras3")
    count = len(params)
    if len(given) not in (2 * count + 2, 2 * count + 3):
        raise CheckpointError(
            f"{job.path}: expected iteration, learning_rate, {2 * count} slots and u_product, got "
            f"{len(given)} arrays"
        )
    first = len(given) - 1 - 2 * count
    slots = {
        "params": list(params.values()),
        "m": given[first:-1:2],
        "v": given[first + 1 : -1 : 2],
    }
    rate = {"lr": given[1]} if first == 2 else {}
    return _state(
        job, about, list(params), (given[0], given[-1]), slots, {"schedule_decay": 1.0, **rate}
    )


def _compare_with_keras_3(state: OptimizerState, job: Conversion) -> None:
    find_momentum(job, state, 1.0, "Keras 3 has 1, fixed")
    find_count(job, state, 2**31 - 1, "Keras 3's int32 iteration")
    clips = [name for name in _CLIPS if getattr(state.config, name) is not None]
    if len(clips) > 1:
        job.differences.append(
            f"clipping: {' and '.join(clips)} are both set here, and Keras 3 takes one of them"
        )


def _common(state: OptimizerState) -> dict[str, Any]:
    clips = {
        name: getattr(state.config, name)
        for name in _CLIPS
        if getattr(state.config, name) is not None
    }
    return {
        "beta_1": state.config.beta_1,
        "beta_2": state.config.beta_2,
        "epsilon": state.config.epsilon,
        **clips,
    }


def _write(
    state: OptimizerState, job: Conversion, kind: str, values: list[Array], settings: dict[str, Any]
) -> None:
    at = state.positions(job.order)
    arrays = {f"params/{state.names[i]}": state.params[i] for i in at}
    arrays |= {f"optimizer/{i:05d}": value for i, value in enumerate(values)}
    write_npz(
        job.path, arrays, {"kind": kind, "config": settings, "layout": state.layout.to_dict()}
    )


def _read(job: Conversion, kind: str) -> tuple[dict[str, Array], dict[str, Any], list[Array]]:
    """Return the parameters in the order of the list, the description, and the list."""
    arrays, about = read_npz(job.path)
    expect_kind(job.path, about, kind)
    params, given = group(arrays, "params"), group(arrays, "optimizer")
    if (
        len(params) + len(given) != len(arrays)
        or set(given) != {f"{i:05d}" for i in range(len(given))}
        or not params
    ):
        raise CheckpointError(
            f"{job.path}: expected entries params/<path> and optimizer/00000 and on, got "
            f"{', '.join(list(arrays)[:5])}"
        )
    names = list(params)
    return (
        {names[i]: params[names[i]] for i in positions(names, job.order)},
        about,
        [given[name] for name in sorted(given)],
    )


def _state(
    job: Conversion,
    about: Mapping[str, Any],
    names: list[str],
    clock: tuple[Any, Any],
    slots: Mapping[str, list[Array]],
    settings: Mapping[str, Any],
) -> OptimizerState:
    where = str(job.path)
    named = {slot: dict(zip(names, arrays, strict=True)) for slot, arrays in slots.items()}
    layout = (
        read_layout(where, about["layout"])
        if "layout" in about
        else layout_of(where, named["params"])
    )
    file, given = _ours(job, settings_of(where, about)), _ours(job, job.config)
    values = {**file, **settings, **given}
    if "lr" in file and _rounds_to(file["lr"], values["lr"]):
        values["lr"] = file["lr"]  # the variable is this, rounded to float32
    if "lr" not in values or not (file or given):
        raise CheckpointError(
            f"{where}: holds no configuration; give config, such as the optimizer's get_config()"
        )
    return make_state(where, layout, make_config(where, values), clock, named)


def _ours(job: Conversion, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in our spelling; add a difference for each setting that we lack."""
    values = dict(given)
    for theirs, ours in (("learning_rate", "lr"), ("decay", "schedule_decay")):
        if theirs in values:
            values[ours] = values.pop(theirs)
    for name, harmless in _LACKING.items():
        value = values.pop(name, None)
        if value is not None and value != harmless:
            job.differences.append(f"{name}: {value!r} there, and distnadam has none")
    return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}


def _rounds_to(rate: Any, variable: Any) -> bool:
    return (
        isinstance(rate, float) and np.shape(variable) == () and bool(np.float32(rate) == variable)
    )
