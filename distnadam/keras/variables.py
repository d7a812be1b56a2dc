"""Variables of Keras, on torch and JAX, as NumPy arrays and back."""

import sys
from typing import Any

import keras
import numpy as np

from distnadam.tensors.arrays import Array
from distnadam.tensors.leaves import as_numpy


def is_traced(value: Any) -> bool:
    """Whether JAX is tracing a program, and the value is none yet."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(getattr(value, "value", value), jax.core.Tracer)


def numpy_of(variable: Any) -> Array:
    """Return a copy of a variable's value."""
    return np.array(as_numpy(variable.value))


def assign(variable: Any, array: Array) -> None:
    """Copy an array into a variable; whoever owns the array may overwrite it."""
    if keras.backend.backend() == "jax":
        jnp = sys.modules["jax"].numpy
        variable.assign(jnp.asarray(np.array(array)))  # which keeps the memory it is given
        return
    value: Any = variable.value
    held = as_numpy(value)
    is_own = value is getattr(variable, "_value", None)  # and no scope of Keras has it
    if is_own and held.ctypes.data == value.data_ptr():
        np.copyto(held, array)
        return
    torch = sys.modules["torch"]
    variable.assign(torch.tensor(np.array(array, np.float32)).to(value.dtype))
