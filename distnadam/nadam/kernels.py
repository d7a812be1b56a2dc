"""Which kernel steps: the compiled loop where llvmlite is installed and compiles it, else NumPy.

Both compute the same bits, so that shards may differ in this.
"""

import importlib.util
import logging
from functools import cache
from typing import Any, Literal

from distnadam.errors import KernelError
from distnadam.extras import how_to_install
from distnadam.nadam.numpy_stepper import NumPyStepper
from distnadam.nadam.stepper import Stepper

log = logging.getLogger("distnadam")

KernelName = Literal["auto", "numpy", "fused"]


def make_stepper(kernel: KernelName, dtype: Any, threads: int = 1) -> Stepper:
    """Return a stepper; "auto" is the fused one where llvmlite is installed and can compile it.

    Raises:
        KernelError: the kernel is "fused", which cannot be compiled or loaded here.
    """
    if kernel == "numpy" or (kernel == "auto" and not fused_installed()):
        return NumPyStepper(dtype, threads)
    try:
        return _fused(dtype, threads)
    except KernelError as error:
        if kernel == "fused":
            raise
        _warn_once(str(error))
        return NumPyStepper(dtype, threads)


def _fused(dtype: Any, threads: int) -> Stepper:
    try:
        from distnadam.nadam.fused_stepper import FusedStepper

        return FusedStepper(dtype, threads)
    except (KernelError, MemoryError):
        raise
    except Exception as error:  # the compiler's are of many classes, and it may not be importable
        raise KernelError(
            "the fused kernel cannot be compiled or loaded: "
            f"{type(error).__name__}: {error}; use kernel='numpy', or {how_to_install('fused')}"
        ) from error


@cache
def _warn_once(why: str) -> None:
    log.warning("%s; the NumPy kernel steps instead, with the same bits", why)


def fused_installed() -> bool:
    """Whether llvmlite, its compiler, can be imported here."""
    try:
        return importlib.util.find_spec("llvmlite") is not None
    except ImportError:  # its import is blocked
        return False
