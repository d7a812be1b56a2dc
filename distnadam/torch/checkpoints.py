"""Checkpoints of the shards, with what torch has beside them: the groups' settings, and buffers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distnadam.checkpoint import store
from distnadam.errors import CheckpointError, StructureError
from distnadam.interop.optimizer_state import load_checkpoint
from distnadam.tensors.arrays import Array
from distnadam.torch.arrays import as_array
from distnadam.torch.state_dict import State, state_from

_KEY = "torch"
_OURS = ("params", "param_names")


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds: parameters by name, torch's state, and what is beside them."""

    params: Mapping[str, Array]
    state: State
    beside: Any


def beside(
    groups: Sequence[Mapping[str, Any]], buffers: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the groups' settings and buffers as a checkpoint's own data."""
    plain = [
        {key: _plain(value) for key, value in group.items() if key not in _OURS} for group in groups
    ]
    return {_KEY: {"groups": plain, "buffers": {k: as_array(b) for k, b in buffers.items()}}}


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) else value


def read_checkpoint(
    path: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    has_product: bool,
    pull_dtype: str | None,
) -> Loaded:
    """Return what a checkpoint holds of these tensors, every byte verified.

    Raises:
        CheckpointError: naming the file that was refused, and why.
        StructureError: it is of other tensors.
    """
    found = load_checkpoint(path)
    _, manifest, _ = store.find(path)
    shapes = {spec.path: spec.shape for spec in found.layout.tensors}
    for name in {**shapes, **tensors}:
        ours = tuple(tensors[name].shape) if name in tensors else "not there"
        if shapes.get(name, "not there") != ours:
            raise StructureError(
                f"{path}: {name!r} is {shapes.get(name, 'not there')} in the checkpoint, and the "
                f"model's is {ours}"
            )
    names = [spec.path for spec in found.layout.tensors]
    slots = found.m, found.v, found.params
    state = state_from(
        names, found.clock, *slots, tensors, has_product=has_product, pull_dtype=pull_dtype
    )
    return Loaded(dict(zip(names, found.params, strict=True)), state, manifest.user_data.get(_KEY))


def check_beside(
    data: Any, num_groups: int, buffers: Mapping[str, torch.Tensor]
) -> tuple[list[dict[str, Any]], Mapping[str, Array]]:
    """Return the groups' settings and the buffers of a checkpoint that `beside` is in.

    Raises:
        CheckpointError: it is no optimizer of torch's form that wrote it, or of other groups.
        StructureError: a buffer does not fit.
    """
    if data is None or len(data["groups"]) != num_groups:
        had = "no groups" if data is None else f"{len(data['groups'])} parameter groups"
        raise CheckpointError(f"the checkpoint has {had}, and the optimizer {num_groups}")
    kept: Mapping[str, Array] = data["buffers"]
    for name, buffer in buffers.items():
        got = kept[name].shape if name in kept else "not there"
        if got != tuple(buffer.shape):
            raise StructureError(
                f"buffer {name!r} is {got} in the checkpoint, and the module's is "
                f"{tuple(buffer.shape)}"
            )
    return [dict(group) for group in data["groups"]], {k: np.array(kept[k]) for k in buffers}
