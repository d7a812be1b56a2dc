"""The step as one compiled loop, a block at a time while it is in the innermost cache: its machine
code, which an earlier process has compiled and kept on disk.

The compiler, llvmlite, is imported only where nothing is kept yet.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from distnadam.nadam.fused_abi import ENTRY, PROTOTYPE
from distnadam.nadam.object_code import cached_code, loaded_code

_SOURCES = [
    Path(__file__).with_name(name) for name in ("fused_loop.py", "fused_abi.py", "instructions.py")
]

_loaded: dict[str, Callable[..., None]] = {}
_loading = threading.Lock()


def load_loop(dtype: str) -> Callable[..., None]:
    """Return the compiled step for a dtype, compiled first if no process has yet."""
    with _loading:
        if dtype not in _loaded:
            code = cached_code(_SOURCES, dtype, lambda: _compile(dtype))
            _loaded[dtype] = loaded_code(code, ENTRY, PROTOTYPE)
        return _loaded[dtype]


def _compile(dtype: str) -> bytes:
    from distnadam.nadam.fused_loop import compile_loop

    return compile_loop(dtype)
