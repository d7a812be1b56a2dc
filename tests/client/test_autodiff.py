"""Gradients from JAX and torch losses, against the gradients written out by hand. Slow: needs both
frameworks installed.
"""

from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.errors import GradientError
from tests.models import bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the frameworks warn of their own affairs

TREE = {
    "layers": [{"kernel": np.linspace(-1, 1, 6).reshape(2, 3), "bias": np.zeros(3)}],
    "scale": np.float64(2),
}


def by_hand(tree: Any) -> list[Any]:
    """The gradients of ``scale * sum(kernel**2) + sum(bias)``, in the order of the leaves."""
    kernel = tree["layers"][0]["kernel"]
    return [np.ones(3), 2 * tree["scale"] * kernel, np.float64((kernel**2).sum())]


def as_type(dtype: str) -> Any:
    layer = TREE["layers"][0]
    return {
        "layers": [{k: v.astype(dtype) for k, v in layer.items()}],
        "scale": np.dtype(dtype).type(2),
    }


def loss(tree: Any) -> Any:
    return (
        tree["scale"] * (tree["layers"][0]["kernel"] ** 2).sum() + tree["layers"][0]["bias"].sum()
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jax_differentiates_a_loss_that_gives_no_gradients(dtype: str) -> None:
    got = DistNadam().get_gradients(loss, as_type(dtype))
    assert [g.dtype.name for g in got] == [dtype] * 3
    for given, expected in zip(got, by_hand(TREE), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-6)


def test_a_loss_that_jax_cannot_differentiate_names_the_parameters() -> None:
    with pytest.raises(GradientError, match=r"'layers/0/bias'.*JAX cannot differentiate"):
        DistNadam().get_gradients(lambda tree: float(np.sum(np.asarray(tree["scale"]))), TREE)


def torch_tree() -> Any:
    import torch

    layer = {k: torch.tensor(v, requires_grad=True) for k, v in TREE["layers"][0].items()}
    return {"layers": [layer], "scale": torch.tensor(2.0, dtype=torch.float64, requires_grad=True)}


def test_torch_differentiates_its_loss() -> None:
    tree = torch_tree()
    got = DistNadam().get_gradients(loss(tree), tree)
    for given, expected in zip(got, by_hand(TREE), strict=True):
        np.testing.assert_allclose(given, expected)


def test_a_torch_gradient_that_cannot_be_had_names_its_parameter() -> None:
    import torch

    tree = torch_tree()
    with pytest.raises(GradientError, match=r"'scale'.*None"):
        DistNadam().get_gradients(
            tree["layers"][0]["kernel"].sum() + tree["layers"][0]["bias"].sum(), tree
        )
    with pytest.raises(GradientError, match="detached"):
        DistNadam().get_gradients(loss(tree).detach(), tree)
    tree["scale"] = torch.tensor(2.0)
    with pytest.raises(GradientError, match=r"'scale'.*requires a gradient"):
        DistNadam().get_gradients(loss(tree), tree)


def test_torch_and_jax_arrays_are_parameters_and_gradients() -> None:
    import jax.numpy as jnp
    import torch

    values = np.linspace(-1, 1, 12, dtype=np.float32)
    ends = []
    makers = [lambda x: x, torch.tensor, jnp.asarray, lambda x: torch.nn.Parameter(torch.tensor(x))]
    for make in makers:
        with DistNadam(backend="local").build({"w": make(values)}) as optimizer:
            optimizer.apply_gradients({"w": make(values)})
            ends.append(bits(optimizer))
    assert all(end == ends[0] for end in ends)


def test_torch_bfloat16_comes_back_as_bfloat16() -> None:
    import torch

    with DistNadam(backend="local").build([torch.ones(5, dtype=torch.bfloat16)]) as optimizer:
        optimizer.apply_gradients([torch.ones(5, dtype=torch.bfloat16)])
        assert optimizer.get_params()[0].dtype.name == "bfloat16"
        assert optimizer.get_weights()[2].dtype == np.float32


def test_denormals_flushed_by_torch_are_refused_by_name() -> None:
    import torch

    from distnadam import Options
    from distnadam.errors import KernelError

    with DistNadam(backend="local", options=Options(threads=1)).build(
        [np.ones(5, np.float32)]
    ) as optimizer:
        torch.set_flush_denormal(True)
        try:
            with pytest.raises(KernelError, match="flushes denormal numbers"):
                optimizer.apply_gradients([np.ones(5, np.float32)])
        finally:
            torch.set_flush_denormal(False)
