"""The step as one compiled loop: mean, scale, clip, step while a block is in the innermost cache.

Loads the machine code of `fused_loop` that an earlier process has compiled and kept on disk, and
calls it on NumPy arrays; numba is imported only where nothing is kept yet.
"""

import ctypes
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.nadam.fused_abi import ARGUMENTS, BLOCK, ENTRY
from distnadam.nadam.object_code import LoadedCode, cached_code
from distnadam.tensors.arrays import Array

_APART = 48
"""Elements between the scratch arrays, so that they do not fall into the same sets of the cache."""

_SOURCE = Path(__file__).with_name("fused_loop.py")

_loaded: dict[str, LoadedCode] = {}
_loading = threading.Lock()


def _loop(dtype: str) -> LoadedCode:
    with _loading:
        if dtype not in _loaded:
            code = cached_code(_SOURCE, dtype, lambda: _compile(dtype))
            _loaded[dtype] = LoadedCode(code, ENTRY, ARGUMENTS)
        return _loaded[dtype]


def _compile(dtype: str) -> bytes:
    from distnadam.nadam.fused_loop import compile_loop

    return compile_loop(dtype)


class Scratch:
    """The working memory of one thread: a block for the mean and one for the new parameters."""

    def __init__(self, dtype: Any) -> None:
        self._memory = np.empty(2 * BLOCK + _APART, dtype)
        self.mean = _address(self._memory)
        self.new = _address(self._memory[-BLOCK:])


def run(
    arrays: tuple[Array, Array, Array, Array],
    gradients: Sequence[Array],
    coefficients: Array,
    scale: float | None,
    clipvalue: float | None,
    scratch: Scratch,
    keep: Array | None = None,
) -> None:
    """Step `arrays` (parameters, both moments, where the new parameters go), contiguous and of one
    length and dtype.

    Args:
        arrays: as above; the last may be the first.
        gradients: arrays of the same length and dtype, averaged in their order.
        coefficients: of the gradient, of the momentum, epsilon, one minus either beta, in the
            arrays' dtype.
        scale: factor on the mean; None leaves it.
        clipvalue: largest magnitude of an element, after the scale; None does not clip.
        scratch: this thread's.
        keep: where the mean, scaled and clipped, is left; None leaves it nowhere.
    """
    none = math.nan
    modifiers = np.array(
        (
            len(gradients),
            none if scale is None else scale,
            none if clipvalue is None else clipvalue,
        ),
        coefficients.dtype,
    )
    _loaded[coefficients.dtype.name](
        arrays[0].size,
        len(gradients),
        0 if keep is None else keep.size,
        scratch.mean,
        (ctypes.c_size_t * len(gradients))(*map(_address, gradients)),
        *map(_address, arrays),
        _address(coefficients),
        _address(modifiers),
        scratch.new,
        None if keep is None else _address(keep),
    )


def _address(values: Array) -> int:
    address: int = values.__array_interface__["data"][0]
    return address


def warm_up(dtype: Any) -> None:
    """Load the loop for a dtype, or compile it where no earlier process has, before the first step
    is timed or waited for.
    """
    _loop(np.dtype(dtype).name)
