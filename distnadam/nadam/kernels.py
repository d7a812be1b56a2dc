"""Which kernel steps: the compiled loop where numba is installed, else NumPy."""

import importlib.util
from typing import Any, Literal

from distnadam.nadam.numpy_stepper import NumPyStepper
from distnadam.nadam.stepper import Stepper

KernelName = Literal["auto", "numpy", "fused"]


def make_stepper(kernel: KernelName, dtype: Any, threads: int = 1) -> Stepper:
    """Return a stepper; "auto" is the fused one where numba is installed."""
    if kernel == "numpy" or (kernel == "auto" and not fused_installed()):
        return NumPyStepper(dtype, threads)
    from distnadam.nadam.fused_stepper import FusedStepper

    return FusedStepper(dtype, threads)


def fused_installed() -> bool:
    """Whether numba can be imported here."""
    try:
        return importlib.util.find_spec("numba") is not None
    except ImportError:  # its import is blocked
        return False
