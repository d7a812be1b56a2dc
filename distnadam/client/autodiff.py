"""Gradients of a loss: computed by the loss itself, by JAX or by torch.

A framework is imported only when a loss needs it.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from distnadam.errors import GradientError, StructureError
from distnadam.extras import how_to_install
from distnadam.tensors.arrays import NAME_OF, Array
from distnadam.tensors.layout import Layout
from distnadam.tensors.leaves import as_numpy, describe_leaf


def gradients_of(loss: Any, params: Any, layout: Layout) -> list[Array]:
    """Return the gradient of `loss` for each tensor of `params`, in the layout's order, unclipped.
    A frozen tensor needs none, and has zeros where it has none.

    Args:
        loss: a callable of the parameter tree, on NumPy arrays, that returns ``(loss, gradients)``;
            or one that returns a scalar alone and that JAX can differentiate; or a torch loss
            tensor computed from `params`, which are then torch tensors.
        params: a tree as given to `build`.
        layout: the model's layout, which names the parameters.

    Raises:
        GradientError: (a ValueError) naming the parameter whose gradient cannot be computed.
    """
    found = gradients_found(loss, params, layout, optional=layout.frozen)
    return [
        np.zeros(tensor.shape, tensor.space) if leaf is None else leaf
        for tensor, leaf in zip(layout.tensors, found, strict=True)
    ]


def gradients_found(
    loss: Any, params: Any, layout: Layout, *, optional: frozenset[int] | None = None
) -> list[Array | None]:
    """Return what `gradients_of` does, None for those at `optional`, the layout's own if not given,
    that have no gradient.

    Raises:
        GradientError: naming the parameter whose gradient cannot be computed.
    """
    optional = layout.optional if optional is None else optional
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(loss, torch.Tensor):
        leaves = layout.leaves_as_given(params, what="params")
        found = _from_torch(loss, leaves, layout, optional)
    elif callable(loss):
        given = layout.unflatten(layout.leaves(params, what="params"))
        value = loss(given)
        if isinstance(value, tuple) and len(value) == 2:
            found = layout.leaves_as_given(value[1], what="gradients")
        else:
            found = _from_jax(loss, given, layout)
    else:
        raise GradientError(
            f"{_first(layout)}: cannot compute a gradient of {type(loss).__name__};"
            " expected a callable of the parameters or a torch loss tensor"
        )
    return [
        None if leaf is None and index in optional else _checked(tensor.path, tensor.shape, leaf)
        for index, (tensor, leaf) in enumerate(zip(layout.tensors, found, strict=True))
    ]


def _checked(path: str, shape: tuple[int, ...], leaf: Any) -> Array:
    if leaf is None:
        raise GradientError(
            f"parameter {path!r}: the loss gave no gradient for it (None); does the loss depend on "
            "it?"
        )
    try:
        array = as_numpy(leaf)
    except StructureError as error:
        raise GradientError(f"parameter {path!r}: {error}") from error.__cause__
    if array.shape != shape or array.dtype not in NAME_OF:
        raise GradientError(
            f"parameter {path!r}: expected a floating-point gradient of shape {shape}, got "
            f"{describe_leaf(leaf, array)}"
        )
    return array


def _from_torch(
    loss: Any, leaves: list[Any], layout: Layout, optional: frozenset[int]
) -> list[Any]:
    import torch

    wanted = []
    for index, (tensor, leaf) in enumerate(zip(layout.tensors, leaves, strict=True)):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            wanted.append(index)
        elif index not in optional:
            raise GradientError(
                f"parameter {tensor.path!r}: expected a torch tensor that requires a gradient, got "
                f"{_kind(leaf)}"
            )
    if not loss.requires_grad:
        raise GradientError(
            f"{_first(layout)}: the loss is detached, it has no gradient with respect to any "
            "parameter"
        )
    try:
        found = torch.autograd.grad(loss, [leaves[index] for index in wanted], allow_unused=True)
    except RuntimeError as error:
        raise GradientError(
            f"{_first(layout)}: torch cannot differentiate the loss: {error}"
        ) from error
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(index) for index in range(len(leaves))]


def _from_jax(loss: Callable[[Any], Any], params: Any, layout: Layout) -> list[Any]:
    try:
        import jax
    except ImportError as error:
        raise GradientError(
            f"{_first(layout)}: the loss returns no gradients, expected (loss, gradients);"
            f" without them JAX is needed: {how_to_install('jax')}"
        ) from error
    wide = any(tensor.dtype == "float64" for tensor in layout.tensors)
    try:
        with jax.enable_x64(wide):  # JAX would round float64 parameters to float32 otherwise
            tree = jax.grad(loss)(params)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GradientError(
            f"{_first(layout)}: JAX cannot differentiate the loss: {reason}"
        ) from error
    return layout.leaves_as_given(tree, what="gradients")


def _first(layout: Layout) -> str:
    return (
        "parameters "
        + ", ".join(repr(t.path) for t in layout.tensors[:3])
        + (", ..." if len(layout.tensors) > 3 else "")
    )


def _kind(leaf: Any) -> str:
    return (
        f"one that does not ({type(leaf).__name__})"
        if hasattr(leaf, "requires_grad")
        else type(leaf).__name__
    )
