"""Keras: the weights of the reference (TF 1.x, tf_keras legacy), and Keras 3's variables.

The reference's Nadam is our formula "nadam", and "nadam_optax" with a schedule_decay of
`NO_SCHEDULE`. Keras 3's is "nadam" with schedule_decay = 1, which it does not store; its
`_u_product` is our m_schedule. Keras 3's Adam and AdamW are "adam_keras", and store no product. Its
`weight_decay` is decoupled in all three, and its `use_ema` is ours. All have one clock, so the
whole state carries over. No list holds the parameters, so a file stores them beside it. Keras is
not imported.

Frozen tensors are among the parameters and not in the list, as Keras leaves out what is not
trainable; a file's description names them, and where there is none, `groups` in `config` must. Of
groups Keras has `exclude_from_weight_decay`, which it does not store, so that it is refused with
that remedy; what else groups have is refused.

A file is an npz: ``params/<path>``, ``optimizer/00000`` and on (the list), and the description
`about` with the framework's config, and Keras 3's class (Nadam where it names none). A user's file
without `about` is accepted too: its list follows the order of its params, and `config` must be
given. A config with `amsgrad` is Adam's or AdamW's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distnadam.errors import CheckpointError, ConversionError
from distnadam.hyperparameters import Formula
from distnadam.interop.formulas import (
    NO_SCHEDULE,
    Conversion,
    find_absent,
    find_average,
    find_count,
    find_formula,
    find_outside,
    is_adam,
    with_own_product,
)
from distnadam.interop.groups import (
    USE_GROUPS,
    few,
    find_one_for_all,
    frozen_in,
    made_groups,
    note_frozen,
    undecayed,
)
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
_AVERAGE = ("use_ema", "ema_momentum", "ema_overwrite_frequency")
_LACKING = {
    "amsgrad": (False, "distnadam has no AMSGrad"),
    "exclude_from_weight_decay": (None, USE_GROUPS),
    "gradient_accumulation_steps": (1, "distnadam steps at every gradient"),
    "loss_scale_factor": (1, "distnadam does not divide gradients"),
}
"""Settings of Keras that we lack, each with the value at which it has no effect, and the reason."""
_CLASSES: dict[str, Formula] = {"Nadam": "nadam", "Adam": "adam_keras", "AdamW": "adam_keras"}
_WITHOUT_EFFECT = {
    "name",
    "jit_compile",
    "is_legacy_optimizer",
}
"""Settings of Keras that do not change a step."""
_ADD_DECAY = "add weight_decay times the variable to its gradient before each step"
_NEGATE = "negate the loss"


def weights(
    state: OptimizerState, order: Sequence[str] | None = None, *, lossy: bool = False
) -> list[Array]:
    """Return the list for the reference's `set_weights`: ``[iterations, m_schedule, *ms, *vs]``.

    Args:
        state: a loaded checkpoint.
        order: the tensors' paths in the order of the Keras optimizer's variables; None means the
            order given to `build`.
        lossy: return them even if the reference would train on differently.

    Raises:
        ConversionError: naming each difference; or the formula is Adam's.
    """
    job = Conversion(Path("the reference's Nadam"), lossy=lossy)
    _compare_with_reference(state, job)
    job.settle()
    at, product = state.trained(order), with_own_product(state).clock.m_schedule
    clock = [np.array(state.clock.iterations, np.int64), np.array(product, np.float64)]
    return [*clock, *(state.m[i] for i in at), *(state.v[i] for i in at)]


def class_of_keras_3(state: OptimizerState) -> Literal["Nadam", "Adam", "AdamW"]:
    """Return which class of Keras 3 goes on from the state."""
    if not is_adam(state.config):
        return "Nadam"
    return "AdamW" if state.weight_decay and state.config.decoupled_weight_decay else "Adam"


def variables(
    state: OptimizerState, order: Sequence[str] | None = None, *, lossy: bool = False
) -> list[Array]:
    """Return the values to assign, one by one, to a built Keras 3 optimizer's `variables`.

    They are ``[iteration, learning_rate, m_0, v_0, m_1, v_1, ...]``, and `u_product` at the end
    for Nadam; with `use_ema` the averages come before the slots.

    Args:
        state: a loaded checkpoint.
        order: as for `weights`.
        lossy: return them even if Keras 3 would train on differently.

    Raises:
        ConversionError: naming each difference.
    """
    job = Conversion(Path(f"keras.optimizers.{class_of_keras_3(state)}"), lossy=lossy)
    _compare_with_keras_3(state, job)
    job.settle()
    at = state.trained(order)
    slots = [array for i in at for array in (state.m[i], state.v[i])]
    if state.ema is not None:
        slots = [*(state.ema[i] for i in at), *slots]
    clock = [np.array(state.clock.iterations, np.int32), np.array(state.rate, np.float32)]
    if is_adam(state.config):
        return [*clock, *slots]
    return [*clock, *slots, np.array(with_own_product(state).clock.m_schedule, np.float32)]


def config(state: OptimizerState) -> dict[str, Any]:
    """Return the reference's configuration; tf_keras legacy calls its `lr` `learning_rate`."""
    ours = state.config
    decay = ours.schedule_decay if ours.has_momentum_schedule else NO_SCHEDULE
    return {"lr": state.rate, **_common(state), "schedule_decay": decay}


def config_of_keras_3(state: OptimizerState) -> dict[str, Any]:
    """Return the arguments of the class of Keras 3 that `class_of_keras_3` names."""
    ours = state.config
    decays = state.weight_decay and ours.decoupled_weight_decay
    decay = {"weight_decay": state.weight_decay} if decays else {}
    average = {name: getattr(ours, name) for name in _AVERAGE} if ours.use_ema else {}
    return {"learning_rate": state.rate, **_common(state), **decay, **average}


def write(state: OptimizerState, job: Conversion) -> None:
    """Write the reference's list beside the parameters."""
    _compare_with_reference(state, job)
    find_outside(job, state, "the reference", clips=("clipnorm", "clipvalue"))
    job.settle()
    values = weights(state, job.order, lossy=job.lossy)
    _write(state, job, {"kind": "keras", "config": config(state)}, values)


def write_keras_3(state: OptimizerState, job: Conversion) -> None:
    """Write Keras 3's variables beside the parameters."""
    _compare_with_keras_3(state, job)
    find_outside(job, state, "Keras 3", clips=_CLIPS)
    job.settle()
    about = {
        "kind": "keras3",
        "class": class_of_keras_3(state),
        "config": config_of_keras_3(state),
    }
    _write(state, job, about, variables(state, job.order, lossy=job.lossy))


def read(job: Conversion) -> OptimizerState:
    """Return the state of a file with the reference's list."""
    params, about, given = _read(job, "keras")
    (settings, _), listed = _settings(job, about), _listed(job, about, params)
    count = len(listed)
    if "amsgrad" in settings or settings.get("formula") in ("adam", "adam_keras"):
        raise ConversionError(
            f"{job.path}: its configuration is Adam's, and the reference's list is Nadam's; of "
            "Adam, those of Keras 3 are taken"
        )
    if len(given) != 2 + 2 * count:
        raise CheckpointError(
            f"{job.path}: expected iterations, m_schedule and {2 * count} slots, got {len(given)} "
            "arrays"
        )
    slots = {"m": given[2 : 2 + count], "v": given[2 + count :]}
    return _state(job, about, params, (given[0], given[1]), slots, settings)


def read_keras_3(job: Conversion) -> OptimizerState:
    """Return the state of a file with Keras 3's variables.

    They hold no learning rate if the optimizer had a schedule.
    """
    params, about, given = _read(job, "keras3")
    (settings, file), listed = _settings(job, about), _listed(job, about, params)
    count = len(listed)
    name = about.get("class", "Adam" if "amsgrad" in settings else "Nadam")
    if not isinstance(name, str) or name not in _CLASSES:
        raise CheckpointError(
            f"{job.path}: its class: expected one of {', '.join(_CLASSES)}, got {name!r}"
        )
    formula = settings.setdefault("formula", _CLASSES[name])
    is_nadam = formula not in ("adam", "adam_keras")
    if settings.pop("amsgrad", False):
        given = given[: len(given) - count]  # the largest second moments, which come last
    if formula == "nadam":
        settings.setdefault("schedule_decay", 1.0)
    averages = count if (file if "config" in about else settings).get("use_ema") else 0
    first = len(given) - 2 * count - averages - is_nadam
    if first not in (1, 2):
        raise CheckpointError(
            f"{job.path}: expected iteration, learning_rate, {2 * count + averages} slots"
            f"{' and u_product' if is_nadam else ''}, got {len(given)} arrays; formula is "
            f"{formula!r}, give another as config if it is not"
        )
    begin, end = first + averages, first + averages + 2 * count
    slots = {"m": given[begin:end:2], "v": given[begin + 1 : end : 2]}
    if averages:
        slots["ema"] = given[first:begin]
    if first == 2 and "lr" not in job.config and "learning_rate" not in job.config:
        variable = given[1]
        if not ("lr" in file and _rounds_to(file["lr"], variable)):
            settings["lr"] = variable
    clock = (given[0], given[-1] if is_nadam else 1.0)
    return with_own_product(_state(job, about, params, clock, slots, settings))


def _compare_with_reference(state: OptimizerState, job: Conversion) -> None:
    what, ours = "the reference", state.config
    if is_adam(ours):
        raise ConversionError(
            f"{job.path}: formula={ours.formula!r} is Adam's, and the reference's list is Nadam's; "
            "Adam is exported to keras3"
        )
    decay = ours.schedule_decay if ours.has_momentum_schedule else NO_SCHEDULE
    find_formula(job, state, "nadam", what, decay=decay)
    find_average(job, state, what)
    find_absent(
        job,
        state,
        what,
        decoupled="multiply each variable by 1 - lr * weight_decay before each step",
        coupled=_ADD_DECAY,
        maximize=_NEGATE,
    )
    _find_groups(job, state, what, clips=("clipnorm", "clipvalue"), excludes=None)


def _compare_with_keras_3(state: OptimizerState, job: Conversion) -> None:
    what, name = "Keras 3", class_of_keras_3(state)
    find_formula(job, state, _CLASSES[name], what, decay=1.0)
    find_count(job, state, 2**31 - 1, "Keras 3's int32 iteration")
    find_absent(job, state, what, decoupled=None, coupled=_ADD_DECAY, maximize=_NEGATE)
    excludes = f"call exclude_from_weight_decay of {name} with these"
    _find_groups(job, state, what, clips=_CLIPS, excludes=excludes)
    clips = [name for name in _CLIPS if getattr(state.config, name) is not None]
    if len(clips) > 1:
        job.differences.append(
            f"clipping: {' and '.join(clips)} are both set here, and Keras 3 takes one of them"
        )


def _find_groups(
    job: Conversion,
    state: OptimizerState,
    what: str,
    *,
    clips: Sequence[str],
    excludes: str | None,
) -> None:
    find_one_for_all(job, state, what, clips=clips)
    still = undecayed(state)
    if still and (excludes is None or not state.config.decoupled_weight_decay):
        job.differences.append(f"weight_decay: takes nothing from {few(still)}; leave these out")
    elif still:
        job.differences.append(
            f"weight_decay: takes nothing from {few(still)} here, and {what} has no argument for "
            f"it: {excludes}"
        )
    note_frozen(job, state, f"set trainable of these to False before {what} is built")


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
    state: OptimizerState, job: Conversion, about: Mapping[str, Any], values: list[Array]
) -> None:
    at = state.positions(job.order)
    arrays = {f"params/{state.names[i]}": state.params[i] for i in at}
    arrays |= {f"optimizer/{i:05d}": value for i, value in enumerate(values)}
    about = {**about, "layout": state.layout.to_dict(), "frozen": state.frozen}
    write_npz(job.path, arrays, about)


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
    names, still = list(params), frozen_in(job, about, list(params))
    return (
        {names[i]: params[names[i]] for i in positions(names, job.order, optional=still)},
        about,
        [given[name] for name in sorted(given)],
    )


def _listed(job: Conversion, about: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """Return the tensors that the optimizer's list holds."""
    still = set(frozen_in(job, about, list(params)))
    return [name for name in params if name not in still]


def _state(
    job: Conversion,
    about: Mapping[str, Any],
    params: Mapping[str, Array],
    clock: tuple[Any, Any],
    slots: Mapping[str, list[Array]],
    settings: Mapping[str, Any],
) -> OptimizerState:
    where = str(job.path)
    listed = _listed(job, about, params)
    named = {slot: dict(zip(listed, arrays, strict=True)) for slot, arrays in slots.items()}
    layout = read_layout(where, about["layout"]) if "layout" in about else layout_of(where, params)
    own = {name: {} if name in named["m"] else {"trainable": False} for name in params}
    settings = {**settings, "groups": made_groups(job, own)}
    if "lr" not in settings or not (about.get("config") or job.config):
        raise CheckpointError(
            f"{where}: holds no configuration; give config, such as the optimizer's get_config()"
        )
    return make_state(
        where, layout, make_config(where, settings), clock, {"params": params, **named}
    )


def _settings(
    job: Conversion, about: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the settings of the file and of `config` in our spelling, and the file's alone.

    `amsgrad` stays among them, since it shows which class they are of.

    Raises:
        ConversionError: one that we lack is set, which other variables follow from.
    """
    file = _ours(settings_of(str(job.path), about))
    values = {**file, **_ours(job.config)}
    for name, (harmless, reason) in _LACKING.items():
        value = values.get(name) if name == "amsgrad" else values.pop(name, None)
        if value is not None and value != harmless:
            job.differences.append(f"{name}: {value!r} there, and {reason}")
    if values.get("weight_decay", 0) is None:
        del values["weight_decay"]
    if values.get("weight_decay") and not (about or job.config.get("groups")):
        job.notes.append(
            "weight_decay: takes from every tensor here; Keras does not store what "
            "exclude_from_weight_decay() left out, which groups in config say"
        )
    job.settle()
    return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}, file


def _ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in our spelling."""
    spelling = {"learning_rate": "lr", "decay": "schedule_decay"}
    return {spelling.get(name, name): value for name, value in given.items()}


def _rounds_to(rate: Any, variable: Any) -> bool:
    return (
        isinstance(rate, float) and np.shape(variable) == () and bool(np.float32(rate) == variable)
    )
