"""optax.nadam, nadamw, adam and adamw, which are our formulas "nadam_optax" and "adam".

Their momentum is constant, so a state of "nadam" is theirs only once our schedule has decayed and
the products agree, and is refused otherwise. optax's `count`, `mu` and `nu` are our iterations, m
and v; the w stands for decoupled weight decay. What optax has transformations of their own for,
`optax.add_decayed_weights`, `optax.scale` and what `optax.masked` limits to frozen tensors or to a
group, is refused with that remedy. Tensors that do not decay are left out by the `mask` of nadamw
and adamw, which `config` returns; a file's description lists them as `undecayed`.

A file is an npz: ``params/<path>``, ``mu/<path>``, ``nu/<path>``, ``count``, and the description
`about` with the function's name and arguments (nadam's where it names none). A user's file without
`about` is accepted too; `config` must then be given, with ``formula="adam"`` for adam and adamw.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distnadam.errors import CheckpointError, ConversionError
from distnadam.extras import how_to_install
from distnadam.hyperparameters import Formula
from distnadam.interop.formulas import (
    Conversion,
    find_absent,
    find_average,
    find_count,
    find_formula,
    find_outside,
    find_product,
    is_adam,
    with_own_product,
)
from distnadam.interop.groups import (
    USE_GROUPS,
    few,
    find_one_for_all,
    made_groups,
    names_in,
    undecayed,
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
_LACKING = {
    "eps_root": (0, "distnadam has none"),
    "mu_dtype": (None, "distnadam keeps the first moment in the masters' dtype"),
    "mask": (None, USE_GROUPS),
}
"""Arguments that we lack, each with the value at which it has no effect, and the reason."""
_FORMULAS: dict[str, Formula] = {
    "nadam": "nadam_optax",
    "nadamw": "nadam_optax",
    "adam": "adam",
    "adamw": "adam",
}


def function_name(state: OptimizerState) -> Literal["nadam", "nadamw", "adam", "adamw"]:
    """Return which function of optax goes on from the state."""
    decays = state.weight_decay and state.config.decoupled_weight_decay
    if is_adam(state.config):
        return "adamw" if decays else "adam"
    return "nadamw" if decays else "nadam"


def config(state: OptimizerState) -> dict[str, Any]:
    """Return the arguments of the function that `function_name` names; optax's defaults are 1e-8
    for eps, and 1e-4 for weight_decay. `mask` is among them if tensors do not decay.
    """
    arguments, still = _config(state), set(undecayed(state))
    if function_name(state).endswith("w") and still:
        arguments["mask"] = state.layout.unflatten([name not in still for name in state.names])
    return arguments


def _config(state: OptimizerState) -> dict[str, Any]:
    """Return the arguments that are plain numbers."""
    ours = state.config
    return {
        "learning_rate": state.rate,
        "b1": ours.beta_1,
        "b2": ours.beta_2,
        "eps": ours.epsilon,
        **({"weight_decay": state.weight_decay} if function_name(state).endswith("w") else {}),
    }


def opt_state(state: OptimizerState, like: Any, *, lossy: bool = False) -> Any:
    """Return an optimizer state that optax continues from.

    Args:
        state: a loaded checkpoint.
        like: the result of `init(params)` of the function that `function_name` names, or of a chain
            with it, for params in the checkpoint's structure.
        lossy: return it even if that function alone would train on differently.

    Raises:
        ConversionError: naming each difference; or optax is not installed.
    """
    job = Conversion(Path(f"optax.{function_name(state)}"), lossy=lossy)
    _compare(state, job)
    job.settle()
    try:
        import jax.numpy as jnp
        import optax
    except ImportError as error:
        raise ConversionError(
            f"optax is not installed, and its states need it: {how_to_install('optax')}"
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
    """Write the optimizer's state beside the parameters."""
    _compare(state, job)
    name = function_name(state)
    find_outside(job, state, f"optax.{name}")
    still = undecayed(state) if name.endswith("w") else []
    if still:
        job.notes.append(
            f"weight_decay: takes nothing from {few(still)}; give optax.{name} a mask with False "
            "for these, which distnadam.interop.optax.config returns"
        )
    job.settle()
    arrays = {
        f"{theirs}/{state.names[i]}": getattr(state, ours)[i]
        for ours, theirs in _SLOTS.items()
        for i in state.positions(job.order)
    }
    arrays["count"] = np.array(state.clock.iterations, np.int32)
    about = {"kind": "optax", "function": name, "config": _config(state), "undecayed": still}
    write_npz(job.path, arrays, {**about, "layout": state.layout.to_dict()})


def read(job: Conversion) -> OptimizerState:
    """Return the state of a file with the state of one of the four functions."""
    where = str(job.path)
    arrays, about = read_npz(job.path)
    expect_kind(job.path, about, "optax")
    slots = {ours: group(arrays, theirs) for ours, theirs in _SLOTS.items()}
    if "count" not in arrays or sum(map(len, slots.values())) + 1 != len(arrays):
        raise CheckpointError(
            f"{where}: expected entries params/, mu/, nu/ and count, got "
            f"{', '.join(list(arrays)[:5])}"
        )
    function = about.get("function", "nadam")
    if not isinstance(function, str) or function not in _FORMULAS:
        raise CheckpointError(
            f"{where}: its function: expected one of {', '.join(_FORMULAS)}, got {function!r}"
        )
    given = {**_ours(settings_of(where, about)), **_ours(job.config)}
    for name, (harmless, reason) in _LACKING.items():
        value = given.pop(name, harmless)
        if value != harmless:
            job.differences.append(f"{name}: {value!r} there, and {reason}")
    if "lr" not in given:
        raise CheckpointError(
            f"{where}: holds no configuration; give config with optax.{function}'s learning_rate"
        )
    layout = (
        read_layout(where, about["layout"])
        if "layout" in about
        else layout_of(where, slots["params"])
    )
    names = [tensor.path for tensor in layout.tensors]
    still = set(names_in(where, about, "undecayed"))
    own = {name: {"weight_decay": 0.0} if name in still else {} for name in names}
    given["groups"] = made_groups(job, own)
    settings = make_config(where, {"epsilon": 1e-8, "formula": _FORMULAS[function], **given})
    return with_own_product(make_state(where, layout, settings, (arrays["count"], 1.0), slots))


def _compare(state: OptimizerState, job: Conversion) -> None:
    name = function_name(state)
    what = f"optax.{name}"
    find_formula(job, state, _FORMULAS[name], what)
    find_product(job, state, what)
    find_count(job, state, 2**31 - 1, "optax's int32 count")
    but = f", with a mask that leaves out {few(undecayed(state))}" if undecayed(state) else ""
    find_average(job, state, what)
    find_absent(
        job,
        state,
        what,
        decoupled=None,
        coupled=f"put optax.add_decayed_weights({state.weight_decay:g}) before it in a "
        f"chain, after clipping{but}",
        maximize="put optax.scale(-1) first in a chain with it",
    )
    find_one_for_all(
        job,
        state,
        what,
        scale="put optax.masked(optax.scale(their quotient), mask) behind it in a chain",
    )
    if state.frozen:
        job.differences.append(
            f"frozen: {few(state.frozen)} here, and {what} steps every tensor: put "
            "optax.masked(optax.set_to_zero(), mask) last in a chain with it"
        )


def _ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function of optax in our spelling."""
    return {_SPELLING.get(name, name): value for name, value in given.items()}
