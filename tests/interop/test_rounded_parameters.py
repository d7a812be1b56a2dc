"""Parameters that workers see in bfloat16, taken by torch and JAX as they lie in memory."""

import warnings
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam

pytestmark = pytest.mark.slow
W = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def torch_gradient(seen: Any) -> tuple[bool, Any]:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(seen.view(np.int16)).view(torch.bfloat16)
    leaf = tensor.detach().requires_grad_()
    (leaf * leaf).sum().backward()
    return tensor.data_ptr() == seen.ctypes.data, leaf.grad


def jax_gradient(seen: Any) -> tuple[bool, Any]:
    jax = pytest.importorskip("jax")
    array = jax.device_put(seen)
    assert array.dtype == seen.dtype
    return (
        array.unsafe_buffer_pointer() == seen.ctypes.data,
        jax.grad(lambda x: (x * x).sum())(array),
    )


@pytest.mark.parametrize("gradient_of", [torch_gradient, jax_gradient])
def test_a_framework_takes_what_a_worker_sees_without_a_copy_and_gives_its_gradient(
    gradient_of: Any,
) -> None:
    with DistNadam(backend="local", pull_dtype="bfloat16").build({"w": W}) as optimizer:
        worker = optimizer.worker(0)
        seen = worker.pull()["w"]
        is_same_memory, gradient = gradient_of(seen)
        assert is_same_memory
        worker.step({"w": gradient})
        master = optimizer.get_params()["w"]
    with DistNadam(backend="local").build({"w": W}) as optimizer:
        optimizer.apply_gradients({"w": 2 * seen})
        assert optimizer.get_params()["w"].tobytes() == master.tobytes()
