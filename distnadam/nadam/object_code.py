"""Machine code kept on disk: loading a function from an object file with LLVM's linker alone.

Knows where compiled loops are kept, when one may be used again (same source, compiler, CPU and
dtype, undamaged), and how to call it. Knows nothing of what it computes, and imports no compiler.
"""

import ctypes
import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from distnadam.errors import KernelError

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
        """Call the function, without the interpreter's lock; raise KernelError if it fails."""
        status = self._function(self._place, self._place, *args)
        if status != 0:
            raise KernelError(
                f"the compiled loop returned status {status}, expected 0; use kernel='numpy'"
            )


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


def cached_code(sources: Sequence[Path], dtype: str, compile_code: Callable[[], bytes]) -> bytes:
    """Return the object file that an earlier process has kept, else compile one and keep it.

    Args:
        sources: the files that determine the code; it is named after the first and kept beside it.
        dtype: of the arrays that the code works on.
        compile_code: compiles the code for this machine's CPU.
    """
    name = f"{sources[0].stem}-{dtype}-{_key(sources, dtype)}.o"
    for directory in code_dirs(sources[0]):
        if (code := _read(directory / name)) is not None:
            return code
        if _can_write(directory):
            code = compile_code()
            _write(directory / name, code)
            return code
    return compile_code()


def code_dirs(source: Path) -> list[Path]:
    """Return where compiled code may be kept, best first; the first that can be written is used.

    These are NUMBA_CACHE_DIR if it is set, __pycache__ beside the source, and the user's own cache
    directory if the user has one.
    """
    found = [source.parent / "__pycache__"]
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        found.insert(0, Path(chosen))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # the user may have no home
        found.append(Path(cache) / "distnadam")
    return found


def _key(sources: Sequence[Path], dtype: str) -> str:
    settings = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR"
    )
    parts = (
        *(source.read_text() for source in (*sources, Path(__file__))),
        version("numba"),
        version("llvmlite"),
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        dtype,
        *settings,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _can_write(directory: Path) -> bool:
    """Return whether files can be made in a directory, which is made if it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)


def _read(path: Path) -> bytes | None:
    """Return the code in a file; None if it is missing or damaged, or another user's."""
    try:
        with path.open("rb") as file:
            is_trusted = os.fstat(file.fileno()).st_uid in (0, os.geteuid())
            raw = file.read() if is_trusted else b""
    except OSError:
        return None
    code = raw[_SUM_BYTES:]
    return code if hashlib.sha256(code).digest() == raw[:_SUM_BYTES] else None


def _write(path: Path, code: bytes) -> None:
    """Keep code for later processes; where that fails, they compile again."""
    written = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        # only its owner may write it, whatever the umask
        handle = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)
