"""The shards' moments and clocks as torch's state of each parameter, and back. No shards.

torch.optim.NAdam keeps `step`, `mu_product`, `exp_avg` and `exp_avg_sq` of each parameter; Adam
and AdamW have no `mu_product`. It is float64 here, as the shards have it; torch rounds it to the
parameter's dtype where its class loads it. A parameter in half precision, or one that shards hand
out rounded (`pull_dtype`), has a `master` too, the float32 numbers that it is rounded from.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distnadam.errors import StructureError
from distnadam.frontends.changes import digest_bytes
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.reproducible_math import power_of_step
from distnadam.tensors.arrays import Array, Flat, empty_flat
from distnadam.tensors.layout import Layout
from distnadam.torch.arrays import as_array, as_torch, bits_of, digest_of

State = dict[Any, dict[str, Any]]
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
MASTER = "master"
NAMES = frozenset(("step", "mu_product", *MOMENTS.values(), MASTER))
"""What a tensor's state has of ours; any other entry is its user's own."""
HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_EXACT = 2**24
"""Steps that float32 counts."""


def has_master(tensor: torch.Tensor, pull_dtype: str | None) -> bool:
    """Whether a parameter that shards step holds rounded numbers, of which they have the master."""
    return tensor.dtype in HALF or (pull_dtype is not None and tensor.dtype == torch.float32)


def rounded(master: torch.Tensor, tensor: torch.Tensor, pull_dtype: str | None) -> torch.Tensor:
    """Return what a parameter of this master holds, on the CPU."""
    seen = master if pull_dtype is None else master.to(torch.bfloat16)
    return seen.to(dtype=tensor.dtype, device="cpu")


def new_state(tensors: Sequence[torch.Tensor], *, has_product: bool) -> State:
    """Return the state before the first step, when a float32 parameter is its own master."""
    state: State = defaultdict(dict)
    for tensor in tensors:
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        state[tensor] = {
            **_clock(0, 1.0, has_product=has_product),
            **{name: torch.zeros(tensor.shape, dtype=wide) for name in MOMENTS.values()},
        }
        if tensor.dtype in HALF and not tensor.is_meta:
            state[tensor][MASTER] = tensor.detach().to("cpu", wide)
    return state


def state_of(
    layout: Layout,
    clock: Clock,
    moments: Mapping[str, Flat],
    tensors: Mapping[str, torch.Tensor],
    *,
    has_product: bool,
    pull_dtype: str | None,
) -> State:
    """Return the state of what the shards hold.

    Args:
        layout: the model's, whose paths are the names of the tensors.
        clock: the optimizer's.
        moments: "m", "v", and "params" where a tensor has a master; the state takes them over.
        tensors: the model's by name.
        has_product: whether the formula has a momentum schedule.
        pull_dtype: to which shards round the parameters that they hand out.
    """
    names = [spec.path for spec in layout.tensors]
    m, v = (layout.views(moments[slot]) for slot in MOMENTS)
    params = layout.views(moments["params"]) if "params" in moments else m
    return state_from(
        names, clock, m, v, params, tensors, has_product=has_product, pull_dtype=pull_dtype
    )


def state_from(
    names: Sequence[str],
    clock: Clock,
    m: Sequence[Array],
    v: Sequence[Array],
    params: Sequence[Array],
    tensors: Mapping[str, torch.Tensor],
    *,
    has_product: bool,
    pull_dtype: str | None,
) -> State:
    """Return the state of moments and masters in the order of `names`; as `state_of`."""
    state: State = defaultdict(dict)
    for index, (name, *moments) in enumerate(zip(names, m, v, strict=True)):
        steps, product = clock.of_tensor(index)
        state[tensors[name]] = {
            **_clock(steps, product, has_product=has_product),
            **dict(zip(MOMENTS.values(), map(as_torch, moments), strict=True)),
        }
        if has_master(tensors[name], pull_dtype):
            state[tensors[name]][MASTER] = as_torch(params[index])
    return state


def masters_of(
    state: State, tensors: Mapping[str, torch.Tensor], pull_dtype: str | None
) -> dict[str, torch.Tensor]:
    """Return the masters of a state by name, of the tensors that are what these round to: one that
    was changed since has no other master than itself.
    """
    found = {}
    for name, tensor in tensors.items():
        master = state.get(tensor, {}).get(MASTER)
        if master is not None and has_master(tensor, pull_dtype):
            held = tensor.detach().to("cpu")
            if torch.equal(bits_of(held), bits_of(rounded(master, tensor, pull_dtype))):
                found[name] = master
    return found


def _clock(steps: int, product: float, *, has_product: bool) -> dict[str, torch.Tensor]:
    wide = torch.float32 if steps <= _EXACT else torch.float64
    clock = {"step": torch.tensor(float(steps), dtype=wide)}
    if has_product:
        clock["mu_product"] = torch.tensor(product, dtype=torch.float64)
    return clock


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of a tensor are equal."""
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def digest(state: State, tensors: Sequence[torch.Tensor]) -> str:
    """Return a digest of the state's bits, in a few letters."""
    names = sorted(NAMES)
    each = (digest_of(state[t][name]) for t in tensors for name in names if name in state[t])
    return digest_bytes("".join(each).encode())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        pair = [each.detach().to("cpu", torch.float64) for each in (one, other)]
        return one.shape == other.shape and bool(torch.equal(*pair))
    return float(one) == float(other)


def check_state(
    state: Mapping[torch.Tensor, Mapping[str, Any]],
    names: Mapping[torch.Tensor, str],
    *,
    has_product: bool,
    pull_dtype: str | None,
) -> None:
    """Raise StructureError for a state that the tensors cannot have, naming the tensor, what was
    expected and what was given.

    Args:
        state: torch's.
        names: of the tensors.
        has_product: whether the formula has a momentum schedule.
        pull_dtype: to which shards round the parameters that they hand out.
    """
    for tensor, each in state.items():
        if tensor not in names:
            continue  # it is of no tensor, but somebody's own
        who = f"of {names[tensor]!r}"
        if "max_exp_avg_sq" in each:
            raise StructureError(
                f"load_state_dict: max_exp_avg_sq {who}: it is amsgrad's, which is not supported"
            )
        for name in (*MOMENTS.values(), MASTER):
            if name in each:
                _check_moment(f"load_state_dict: {name} {who}", name, each[name], tensor.shape)
        if MASTER in each and not has_master(tensor, pull_dtype):
            _check_not_finer(f"load_state_dict: {MASTER} {who}", each[MASTER], tensor)
        steps, product = float(each.get("step", 0.0)), float(each.get("mu_product", 1.0))
        if not 0 <= steps < 2**53 or steps != int(steps):
            raise StructureError(
                f"load_state_dict: step {who}: expected a whole number of at least 0, got {steps!r}"
            )
        if has_product and steps and "exp_avg" in each and "mu_product" not in each:
            raise StructureError(
                f"load_state_dict: mu_product {who} is not there, and its step is {steps:g}: the "
                "state is of a formula without momentum schedule, such as Adam's"
            )
        if not 0.0 <= product <= 1.0:
            raise StructureError(
                f"load_state_dict: mu_product {who}: expected a number in [0, 1], got {product!r}"
            )


def _check_moment(what: str, name: str, given: Any, shape: Sequence[int]) -> None:
    array = as_array(given) if isinstance(given, torch.Tensor) else np.asarray(given)
    if array.shape != tuple(shape):
        raise StructureError(f"{what}: expected shape {tuple(shape)}, got shape {array.shape}")
    wide = array.astype(np.float64)
    if not np.isfinite(wide).all() or (name == "exp_avg_sq" and (wide < 0).any()):
        must = "finite and at least 0" if name == "exp_avg_sq" else "finite"
        raise StructureError(f"{what}: expected numbers that are {must}")


def _check_not_finer(what: str, master: Any, tensor: torch.Tensor) -> None:
    """Refuse a master that is lost with a parameter that is stepped as the model holds it."""
    if not tensor.is_meta and not _equal(torch.as_tensor(master), tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise StructureError(
            f"{what}: it has bits that the parameter has not, and would be lost, since this "
            f"optimizer steps the {dtype} parameter itself: copy the master into the parameter "
            "first, or make the optimizer with pull_dtype='bfloat16', which keeps masters"
        )


def flat_of(
    layout: Layout,
    state: Mapping[torch.Tensor, Mapping[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    *,
    beta_1: float | None,
) -> tuple[Clock, dict[str, Flat]]:
    """Return the clock and the moments of a checked state; a tensor that it lacks is before its
    first step.

    Args:
        layout: the model's.
        state: torch's.
        tensors: the model's by name.
        beta_1: the constant momentum, whose power the product is; None: the state has it.
    """
    moments = {slot: empty_flat(layout.sizes) for slot in MOMENTS}
    for slot, name in MOMENTS.items():
        for spec, view in zip(layout.tensors, layout.views(moments[slot]), strict=True):
            given = state.get(tensors[spec.path], {}).get(name, 0.0)
            view[...] = as_array(given) if isinstance(given, torch.Tensor) else given
    clocks = []
    for spec in layout.tensors:
        each = state.get(tensors[spec.path], {})
        steps, product = int(float(each.get("step", 0.0))), float(each.get("mu_product", 1.0))
        if beta_1 is not None:
            product = power_of_step(beta_1, 1.0, steps) if steps else 1.0
        clocks.append(TensorClock(steps, product))
    apart = TensorClocks.of(clocks) if len(set(clocks)) > 1 else None
    return Clock(*max(clocks), apart), moments
