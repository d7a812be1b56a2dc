"""torch.optim.NAdam, which is our formula with `momentum_decay` for schedule_decay.

It has a clock per tensor: `step` is our iterations and `mu_product` our m_schedule, in float32; an
import requires them to be equal in all tensors. We lack its weight decay, `maximize`, and groups of
parameters with different settings.

A file is written by torch.save, of ``{"model": {path: tensor}, "optimizer": state_dict, "about":
JSON}``; a user's file without `about` is accepted too. It is loaded with weights_only=True. Torch
matches by position: both are in the order given to `build`, or in the one asked for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distnadam.errors import CheckpointError, ConversionError
from distnadam.interop.formulas import Conversion, find_outside
from distnadam.interop.npz import about_from, about_text, expect_kind, write_whole
from distnadam.interop.optimizer_state import (
    OptimizerState,
    layout_of,
    make_config,
    make_state,
    read_array,
    read_layout,
)

_SLOTS = {"m": "exp_avg", "v": "exp_avg_sq"}
_LACKING = {"weight_decay": 0, "maximize": False}
_LARGEST_STEP = 2**24
_SETTINGS = ("lr", "betas", "eps", "momentum_decay", *_LACKING)


def state_dict(state: OptimizerState, order: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a state_dict for `torch.optim.NAdam.load_state_dict`, which matches by position.

    Args:
        state: a loaded checkpoint.
        order: the tensors' paths in the order of the NAdam's parameters, for a module the names of
            its `named_parameters()`; None means the order given to `build`, which for
            ``build(dict(module.named_parameters()))`` is that. The result holds them as
            `param_names`.
    """
    torch = _torch()
    config, at = state.config, state.positions(order)
    nadam = torch.optim.NAdam(
        [torch.zeros(())],
        lr=state.rate,
        betas=(config.beta_1, config.beta_2),
        eps=config.epsilon,
        momentum_decay=config.schedule_decay,
    )
    names = [state.names[i] for i in at]
    group = nadam.state_dict()["param_groups"][0] | {
        "params": list(range(len(at))),
        "param_names": names,
    }
    if state.clock.iterations == 0:
        return {"state": {}, "param_groups": [group]}
    slots = {
        number: {
            "step": torch.tensor(float(state.clock.iterations), dtype=torch.float32),
            "mu_product": torch.tensor(state.clock.m_schedule, dtype=torch.float64),
            **{name: _tensor(getattr(state, slot)[i]) for slot, name in _SLOTS.items()},
        }
        for number, i in enumerate(at)
    }
    return {"state": slots, "param_groups": [group]}


def write(state: OptimizerState, job: Conversion) -> None:
    """Write the parameters and the state_dict."""
    torch = _torch()
    find_outside(job, state, "torch.optim.NAdam")
    if state.clock.iterations >= _LARGEST_STEP:
        job.notes.append(
            f"step: {state.clock.iterations} here, and torch.optim.NAdam's float32 step stands "
            f"still at {_LARGEST_STEP}"
        )
    job.settle()
    model = {state.names[i]: _tensor(state.params[i]) for i in state.positions(job.order)}
    about = about_text({"kind": "torch", "layout": state.layout.to_dict()})
    content = {"model": model, "optimizer": state_dict(state, job.order), "about": about}
    write_whole(job.path, lambda temporary: torch.save(content, temporary))


def read(job: Conversion) -> OptimizerState:
    """Return the state of a file with the state_dicts of a model and of its NAdam."""
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
    model, (settings, state, names) = content["model"], _optimizer(job, content["optimizer"])
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
    params = {name: model[name] for name in names}
    layout = read_layout(where, about["layout"]) if "layout" in about else layout_of(where, params)
    config = make_config(where, {**settings, **job.config})
    clock, slots = _slots(where, names, state)
    return make_state(where, layout, config, clock, {"params": params, **slots})


def _optimizer(job: Conversion, given: Any) -> tuple[dict[str, Any], list[Any], list[str] | None]:
    """Return a state_dict's settings in our spelling, and its tensors' states and names."""
    where = f"{job.path}: optimizer"
    try:
        groups, states = given["param_groups"], given["state"]
        numbers = [number for group in groups for number in group["params"]]
        settings = [{name: group[name] for name in _SETTINGS} for group in groups]
        named = [name for group in groups for name in group.get("param_names", ())]
        beta_1, beta_2 = settings[0]["betas"]
        ordered = [states.get(number, {}) for number in numbers]
        numbered = set(states) <= set(numbers) and all(isinstance(state, dict) for state in ordered)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: expected a state_dict of torch.optim.NAdam, and it lacks or misstates "
            f"{type(error).__name__}: {error}"
        ) from error
    if not numbered:
        raise CheckpointError(f"{where}: its state is not that of the parameters in its groups")
    for name in _SETTINGS:
        values = list(dict.fromkeys(str(s[name]) for s in settings))
        if len(values) > 1:
            raise ConversionError(
                f"{where}: {name}: its parameter groups have {' and '.join(values)}, and distnadam "
                "has one for all tensors"
            )
    for name, harmless in _LACKING.items():
        if settings[0][name] != harmless:
            job.differences.append(f"{name}: {settings[0][name]!r} there, and distnadam has none")
    names = list(job.order) if job.order is not None else named or None
    spelled = {"lr": settings[0]["lr"], "beta_1": beta_1, "beta_2": beta_2}
    return (
        spelled | {"epsilon": settings[0]["eps"], "schedule_decay": settings[0]["momentum_decay"]},
        ordered,
        names,
    )


def _slots(
    where: str, names: list[str], states: list[Any]
) -> tuple[tuple[Any, Any], dict[str, dict[str, Any]]]:
    """Return the clock, which must be equal in all tensors, and the moments by slot and name."""
    if not any(states):
        return (0, 1.0), {}
    for name, state in zip(names, states, strict=True):
        lacking = [key for key in ("step", "mu_product", *_SLOTS.values()) if key not in state]
        if lacking:
            raise CheckpointError(
                f"{where}: optimizer: {name!r}: expected step, mu_product, exp_avg and exp_avg_sq; "
                f"{lacking[0]} is missing"
            )
    for key in ("step", "mu_product"):
        values = [read_array(f"{where}: {key}", state[key]) for state in states]
        if any(value.shape != () or value.dtype.kind not in "fiu" for value in values):
            raise CheckpointError(f"{where}: optimizer: {key}: expected one number per tensor")
        for name, value in zip(names, values, strict=True):
            if not np.isclose(
                value, values[0], rtol=1e-5 if key == "mu_product" else 0.0, atol=0.0
            ):
                raise ConversionError(
                    f"{where}: {key} of {name!r} is {value}, of {names[0]!r} {values[0]}: "
                    "distnadam has one clock for all tensors, which all step at every step"
                )
    slots = {
        slot: {n: s[key] for n, s in zip(names, states, strict=True)}
        for slot, key in _SLOTS.items()
    }
    best = max(
        (read_array(where, state["mu_product"]) for state in states),
        key=lambda value: value.dtype.itemsize,
    )
    return (read_array(where, states[0]["step"]), best), slots


def _tensor(array: Any) -> Any:
    return _torch().from_numpy(np.array(array))


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            "torch is not installed, and its files need it: pip install 'distnadam[torch]'"
        ) from error
    return torch
