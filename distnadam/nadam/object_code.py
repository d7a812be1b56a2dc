"""Machine code kept on disk: loading a function from an object file with LLVM's linker alone.

Knows where compiled loops are kept, when one may be used again (same source, compiler, CPU and
dtype, undamaged), and how to call it. Knows nothing of what it computes, and imports no compiler.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

_SUM_BYTES = 32


class LoadedCode:
    """A function out of an object file, callable as long as this object lives.

    Args:
        code: the object file; it must be of this machine's CPU.
        name: of the function.
        argument_types: of the function, of ctypes. Numba's own convention puts two pointers
            before them, for a returned value and for an exception.
    """

    def __init__(self, code: bytes, name: str, argument_types: tuple[Any, ...]) -> None:
        machine = host_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *argument_types)
        self._function = kind(self._engine.get_function_address(name))
        self._result = ctypes.create_string_buffer(16)
        self._place = ctypes.addressof(self._result)

    def __call__(self, *args: Any) -> None:
        """Call the function, without the interpreter's lock."""
        self._function(self._place, self._place, *args)


def host_machine() -> Any:
    """Return LLVM's description of this machine, to make code for it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


def cached_code(source: Path, dtype: str, compile_code: Callable[[], bytes]) -> bytes:
    """Return the object file that an earlier process has kept, else compile one and keep it."""
    path = code_dir() / f"{source.stem}-{dtype}-{_key(source, dtype)}.o"
    code = _read(path)
    if code is None:
        code = compile_code()
        _write(path, code)
    return code


def code_dir() -> Path:
    """Return where compiled code is kept.

    It is NUMBA_CACHE_DIR where that is set, else beside this module if that can be written, else
    the user's own cache directory.
    """
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    beside = Path(__file__).parent
    if os.access(beside, os.W_OK):
        return beside / "__pycache__"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distnadam"


def _key(source: Path, dtype: str) -> str:
    parts = (
        source.read_text(),
        Path(__file__).read_text(),
        version("numba"),
        version("llvmlite"),
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        dtype,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> bytes | None:
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    code = raw[_SUM_BYTES:]
    return code if hashlib.sha256(code).digest() == raw[:_SUM_BYTES] else None


def _write(path: Path, code: bytes) -> None:
    """Keep code for later processes; where that fails, they compile again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(written, path)
    except OSError:
        return
