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

_SOURCES = [Path(__file__).with_name(name) for name in ("fused_loop.py", "fused_abi.py")]

_loaded: dict[str, LoadedCode] = {}
_loading = threading.Lock()


def _loop(dtype: str) -> LoadedCode:
    with _loading:
        if dtype not in _loaded:
            code = cached_code(_SOURCES, dtype, lambda: _compile(dtype))
            _loaded[dtype] = LoadedCode(code, ENTRY, ARGUMENTS)
        return _loaded[dtype]


def _compile(dtype: str) -> bytes:
    from distnadam.nadam.fused_loop import compile_loop

    return compile_loop(dtype)


class FusedLoop:
    """The compiled loop for one dtype, with the working memory of one thread."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._memory = np.empty(2 * BLOCK + _APART, dtype)
        self._mean = _address(self._memory)
        self._new = _address(self._memory[-BLOCK:])

    def run(
        self,
        arrays: tuple[Array, Array, Array, Array],
        gradients: Sequence[Array],
        coefficients: Array,
        scale: float | None,
        clipvalue: float | None,
        keep: Array | None = None,
    ) -> None:
        """Step `arrays`: parameters, both moments, and where the new parameters go.

        Args:
            arrays: contiguous, of one length and the loop's dtype; the last may be the first.
            gradients: arrays of the same length and dtype, averaged in their order.
            coefficients: of the gradient, of the momentum, epsilon, one minus either beta.
            scale: factor on the mean; None leaves it.
            clipvalue: largest magnitude of an element, after the scale; None does not clip.
            keep: where the mean, scaled and clipped, is left; None leaves it nowhere.
        """
        none = math.nan
        modifiers = np.array(
            (
                len(gradients),
                none if scale is None else scale,
                none if clipvalue is None else clipvalue,
            ),
            self._dtype,
        )
        _loaded[self._dtype.name](
            arrays[0].size,
            len(gradients),
            0 if keep is None else keep.size,
            self._mean,
            (ctypes.c_size_t * len(gradients))(*map(_address, gradients)),
            *map(_address, arrays),
            _address(coefficients),
            _address(modifiers),
            self._new,
            None if keep is None else _address(keep),
        )


def _address(values: Array) -> int:
    address: int = values.__array_interface__["data"][0]
    return address


def warm_up(dtype: Any) -> None:
    """Load the loop for a dtype, or compile it if no process has yet, before the first step."""
    _loop(np.dtype(dtype).name)
