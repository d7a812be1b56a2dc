"""torch.optim.NAdam, Adam and AdamW, which are our formulas "nadam" and "adam".

`momentum_decay` is schedule_decay, and AdamW is Adam with `decoupled_weight_decay`, which NAdam has
too. NAdam also computes "nadam_optax", with a momentum_decay of `NO_SCHEDULE`. We lack `amsgrad`.

Parameter groups are our groups: first the tensors in none, then each group's, with `lr`, `betas`,
`eps` and `weight_decay`; what else differs between them is refused. An import has the settings of
most tensors as the optimizer's, and groups for the others. Frozen tensors are in the model and in
no parameter group, as torch's users have it who give an optimizer only what requires gradients; a
file's description names them, and where there is none, `groups` in `config` must.

They have a clock per tensor, `step` and NAdam's `mu_product`, which are ours with
``clocks="tensor"``, in float32 (see `torch_clocks`). A tensor that was never stepped has none, and
no moments: an import takes it as such with ``clocks="tensor"``.

A file is written by torch.save, of ``{"model": {path: tensor}, "optimizer": state_dict, "about":
JSON}``; a user's file without `about` is accepted too. It is loaded with weights_only=True. Torch
matches by position: both are in the order given to `build`, or in the one asked for. Which class a
state_dict is of shows in its groups: `momentum_decay` is NAdam's, `amsgrad` Adam's and AdamW's.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distnadam.checks import BETAS
from distnadam.errors import CheckpointError, ConversionError
from distnadam.extras import how_to_install
from distnadam.hyperparameters import NadamConfig
from distnadam.interop.formulas import (
    NO_SCHEDULE,
    Conversion,
    find_average,
    find_formula,
    find_outside,
    is_adam,
    with_own_product,
)
from distnadam.interop.groups import (
    Own,
    base_and_own,
    few,
    frozen_in,
    made_groups,
    note_frozen,
)
from distnadam.interop.npz import about_from, about_text, expect_kind, write_whole
from distnadam.interop.optimizer_state import (
    OptimizerState,
    layout_of,
    make_config,
    make_state,
    read_layout,
)
from distnadam.interop.torch_clocks import clock_state, clocks_in

_SLOTS = {"m": "exp_avg", "v": "exp_avg_sq"}
_LARGEST_STEP = 2**24
_SPELLING = {"lr": "lr", "eps": "epsilon", "weight_decay": "weight_decay"}
_OWN = ("lr", *BETAS, "epsilon", "weight_decay")
"""What a parameter group may have of its own, in our spelling."""
_FLAGS = ("decoupled_weight_decay", "maximize", "amsgrad")
_CLASSES = "torch.optim.NAdam, Adam or AdamW"


def class_name(state: OptimizerState) -> Literal["NAdam", "Adam", "AdamW"]:
    """Return which class of torch.optim goes on from the state."""
    if not is_adam(state.config):
        return "NAdam"
    return "AdamW" if state.weight_decay and state.config.decoupled_weight_decay else "Adam"


def state_dict(
    state: OptimizerState, order: Sequence[str] | None = None, *, lossy: bool = False
) -> dict[str, Any]:
    """Return a state_dict for the class of torch.optim that `class_name` names, whose
    `load_state_dict` matches by position.

    It has a parameter group for the tensors in no group of ours, then one for each of ours; frozen
    tensors are in none.

    Args:
        state: a loaded checkpoint.
        order: the tensors' paths in the order of that optimizer's parameters, for a module the
            names of its `named_parameters()`; None means the order given to `build`, which for
            ``build(dict(module.named_parameters()))`` is that. The result holds them as
            `param_names`.
        lossy: return it even if torch would train on differently.

    Raises:
        ConversionError: naming each difference; or torch is not installed.
    """
    torch = _torch()
    job = Conversion(Path(f"torch.optim.{class_name(state)}"), lossy=lossy)
    _compare(state, job)
    job.settle()
    at = sorted(state.trained(order), key=lambda i: state.groups[i])
    optimizer = getattr(torch.optim, class_name(state))([torch.zeros(())], **_arguments(state))
    common = optimizer.state_dict()["param_groups"][0] | {
        "decoupled_weight_decay": state.config.decoupled_weight_decay
    }
    groups: list[dict[str, Any]] = []
    for _, each in itertools.groupby(enumerate(at), key=lambda pair: state.groups[pair[1]]):
        numbers, tensors = zip(*each, strict=True)
        rate, own = state.settings[tensors[0]]
        values = {
            "lr": rate,
            "betas": (own.beta_1, own.beta_2),
            "eps": own.epsilon,
            "weight_decay": own.weight_decay,
        }
        names = [state.names[i] for i in tensors]
        groups.append({**common, **values, "params": list(numbers), "param_names": names})
    clock = with_own_product(state).clock
    slots = {
        number: {
            **clock_state(clock.of_tensor(i), state.config),
            **{name: _tensor(getattr(state, slot)[i]) for slot, name in _SLOTS.items()},
        }
        for number, i in enumerate(at)
        if clock.of_tensor(i).steps
    }
    return {"state": slots, "param_groups": groups}


def write(state: OptimizerState, job: Conversion) -> None:
    """Write the parameters and the state_dict."""
    torch, what = _torch(), f"torch.optim.{class_name(state)}"
    _compare(state, job)
    find_outside(job, state, what)
    if state.clock.iterations >= _LARGEST_STEP:
        job.notes.append(
            f"step: {state.clock.iterations} here, and {what}'s float32 step stands still at "
            f"{_LARGEST_STEP}"
        )
    job.settle()
    optimizer = state_dict(state, job.order, lossy=job.lossy)
    if len(optimizer["param_groups"]) > 1:
        shown = "; ".join(few(each["param_names"]) for each in optimizer["param_groups"])
        job.notes.append(
            f"groups: give {what} its parameters in {len(optimizer['param_groups'])} groups, in "
            f"this order: {shown}"
        )
    model = {state.names[i]: _tensor(state.params[i]) for i in state.positions(job.order)}
    about = about_text(
        {
            "kind": "torch",
            "layout": state.layout.to_dict(),
            "frozen": state.frozen,
            **({} if state.config.clocks == "one" else {"clocks": state.config.clocks}),
        }
    )
    content = {"model": model, "optimizer": optimizer, "about": about}
    write_whole(job.path, lambda temporary: torch.save(content, temporary))


def read(job: Conversion) -> OptimizerState:
    """Return the state of a file with the state_dicts of a model and of its optimizer."""
    torch, where = _torch(), str(job.path)
    try:
        content = torch.load(job.path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{where}: cannot be read as a file of torch.save with weights_only=True: {reason}"
        ) from error
    if not isinstance(content, dict) or not {"model", "optimizer"} <= content.keys():
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{where}: expected a dict of model and optimizer (two state_dicts), got {got}"
        )
    about = about_from(where, content["about"]) if isinstance(content.get("about"), str) else {}
    expect_kind(job.path, about, "torch")
    model, (common, each, state, names) = content["model"], _optimizer(job, content["optimizer"])
    if not isinstance(model, dict) or not all(isinstance(t, torch.Tensor) for t in model.values()):
        raise CheckpointError(
            f"{where}: model: expected a dict of tensors by name, got {type(model).__name__}"
        )
    if names is None:
        names = list(model)
        if len(names) != len(state):
            raise CheckpointError(
                f"{where}: the optimizer has {len(state)} tensors and the model {len(names)}; give "
                "their names as order"
            )
    missing = [name for name in names if name not in model]
    if missing or len(names) != len(state):
        raise CheckpointError(
            f"{where}: the optimizer has {len(state)} tensors, named {names[:3]} and on; the model "
            f"lacks {missing[:3]}"
        )
    still = frozen_in(job, about, list(model))
    params = {name: model[name] for name in dict.fromkeys((*names, *still))}
    layout = read_layout(where, about["layout"]) if "layout" in about else layout_of(where, params)
    settings = _settings(job, common, dict(zip(names, each, strict=True)), still)
    left = [name for name in model if name not in params]
    if left:
        job.notes.append(
            f"model: {few(left)}: in no group of the optimizer, and left out; what is frozen comes "
            "along with groups in config, such as [{'pattern': '**', 'trainable': False}] of its "
            "path"
        )
    settings = {**({"clocks": about["clocks"]} if "clocks" in about else {}), **settings}
    stepped = {n: s for n, s in zip(names, state, strict=True) if n not in still}
    config = make_config(where, settings)
    slots = _slots(where, stepped, params, config)
    config, clock, tensors = clocks_in(where, stepped, layout, config, given="clocks" in settings)
    loaded = make_state(where, layout, config, clock, {"params": params, **slots}, tensors)
    return with_own_product(loaded)


def _compare(state: OptimizerState, job: Conversion) -> None:
    what = f"torch.optim.{class_name(state)}"
    theirs: Literal["adam", "nadam"] = "adam" if is_adam(state.config) else "nadam"
    find_formula(job, state, theirs, what, decay=_momentum_decay(state))
    note_frozen(job, state, f"set requires_grad to False, and give {what} the others alone")
    find_average(job, state, what)


def _momentum_decay(state: OptimizerState) -> float:
    config = state.config
    return config.schedule_decay if config.has_momentum_schedule else NO_SCHEDULE


def _arguments(state: OptimizerState) -> dict[str, Any]:
    config, name = state.config, class_name(state)
    arguments = {
        "lr": state.rate,
        "betas": (config.beta_1, config.beta_2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
        "maximize": config.maximize,
    }
    return arguments | ({"momentum_decay": _momentum_decay(state)} if name == "NAdam" else {})


def _optimizer(
    job: Conversion, given: Any
) -> tuple[dict[str, Any], list[Own], list[Any], list[str] | None]:
    """Return the settings that a state_dict's groups have in common; and its tensors' other
    settings, states and names.
    """
    where = f"{job.path}: optimizer"
    try:
        groups, states = given["param_groups"], given["state"]
        numbers = [number for group in groups for number in group["params"]]
        settings = [_of_group(group) for group in groups]
        named = [name for group in groups for name in group.get("param_names", ())]
        ordered = [states.get(number, {}) for number in numbers]
        numbered = set(states) <= set(numbers) and all(isinstance(state, dict) for state in ordered)
        own = [
            {name: each[name] for name in _OWN}
            for each, group in zip(settings, groups, strict=True)
            for _ in group["params"]
        ]
        first = settings[0]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: expected a state_dict of {_CLASSES}, and it lacks or misstates "
            f"{type(error).__name__}: {error}"
        ) from error
    if not numbered:
        raise CheckpointError(f"{where}: its state is not that of the parameters in its groups")
    common = dict.fromkeys(name for group in settings for name in group if name not in own[0])
    for name in common:
        values = list(dict.fromkeys(str(s.get(name)) for s in settings))
        if len(values) > 1:
            raise ConversionError(
                f"{where}: {name}: its parameter groups have {' and '.join(values)}, and distnadam "
                "has one for all tensors"
            )
    names = list(job.order) if job.order is not None else named or None
    return {name: first[name] for name in common if name in first}, own, ordered, names


def _of_group(group: Any) -> dict[str, Any]:
    """Return a group's settings in our spelling, with the flags that it holds."""
    is_nadam = "momentum_decay" in group
    if not is_nadam and "amsgrad" not in group:
        raise KeyError("momentum_decay (of NAdam) or amsgrad (of Adam and AdamW)")
    beta_1, beta_2 = group["betas"]
    values = {ours: _plain(group[theirs]) for theirs, ours in _SPELLING.items()}
    values |= {"formula": "nadam" if is_nadam else "adam", "beta_1": beta_1, "beta_2": beta_2}
    if is_nadam:
        values["schedule_decay"] = group["momentum_decay"]
    return values | {name: group[name] for name in _FLAGS if name in group}


def _plain(value: Any) -> Any:
    """Return the number in an array, as torch's learning rate may be one."""
    return value.item() if getattr(value, "shape", None) == () else value


def _settings(
    job: Conversion, common: dict[str, Any], own: dict[str, Own], frozen: list[str]
) -> dict[str, Any]:
    """Return the settings of a file and of `config`; add a difference for AMSGrad.

    Args:
        job: the import.
        common: what all parameter groups have.
        own: by tensor, what its group has.
        frozen: the tensors that are frozen.

    Raises:
        ConversionError: the file is of an earlier torch, and does not say whether it is of Adam or
            of AdamW, whose weight decay differs.
    """
    trained = {
        name: {**each, **{key: job.config[key] for key in each if key in job.config}}
        for name, each in own.items()
        if name not in frozen
    }
    base, others = base_and_own(trained)
    others |= {name: {"trainable": False} for name in frozen}
    decay = next((each["weight_decay"] for each in trained.values() if each["weight_decay"]), 0.0)
    values = {**common, **base, **job.config, "groups": made_groups(job, others)}
    if any("lr" in each for each in others.values()):
        job.notes.append(
            f"learning rate: {base['lr']!r}, and groups with rates of their own, which stay what "
            "they are when the optimizer's is set"
        )
    if values.pop("amsgrad", False):
        job.differences.append("amsgrad: True there, and distnadam has no AMSGrad")
    if "decoupled_weight_decay" not in values:
        if values["formula"] == "adam" and decay:
            raise ConversionError(
                f"{job.path}: optimizer: weight_decay: {decay!r} there, and an "
                "earlier torch's state_dict does not say whether it is Adam's or AdamW's; give "
                "decoupled_weight_decay in config, False for Adam and True for AdamW"
            )
        values["decoupled_weight_decay"] = False
    return values


def _slots(
    where: str, states: Mapping[str, Any], params: Mapping[str, Any], config: NadamConfig
) -> dict[str, dict[str, Any]]:
    """Return the moments by slot and name, zeros of what was never stepped.

    Raises:
        CheckpointError: a tensor lacks one, or its clock.
    """
    if not any(states.values()):
        return {}
    needed = ("step", *(() if is_adam(config) else ("mu_product",)), *_SLOTS.values())
    for name, state in states.items():
        lacking = [key for key in needed if key not in state]
        if lacking and (state or config.clocks == "one"):
            raise CheckpointError(
                f"{where}: optimizer: {name!r}: expected {', '.join(needed[:-1])} and "
                f"{needed[-1]}; {lacking[0]} is missing. If it is frozen, say so by groups in "
                "config; if it was never stepped, give clocks='tensor' there"
            )
    return {
        slot: {
            name: state[key] if state else np.zeros(params[name].shape, np.float32)
            for name, state in states.items()
        }
        for slot, key in _SLOTS.items()
    }


def _tensor(array: Any) -> Any:
    return _torch().from_numpy(np.array(array))


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"torch is not installed, and its files need it: {how_to_install('torch')}"
        ) from error
    return torch
