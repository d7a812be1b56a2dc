"""Machine code kept on disk: running a function out of an object file.

Knows where compiled loops are kept, when one may be used again (same source, compiler, CPU and
dtype, undamaged), and how to call it. Knows nothing of what it computes. LLVM comes into memory, 50
MB of it, only where code is compiled or has to be linked.
"""

import ctypes
import hashlib
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_SUM_BYTES = 32
_MOST_BYTES = 1 << 20
_EXECUTABLE = 4
"""ELF's flag of a section with instructions."""
_RELOCATIONS = (4, 9)
"""ELF's types of sections that say what a linker changes in another."""
_OF_THE_PROCESSOR = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "Features",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "isa",
    "uarch",
)
"""The lines of Linux's /proc/cpuinfo that tell one processor from another."""


def loaded_code(code: bytes, name: str, prototype: Callable[[int], Any]) -> Callable[..., Any]:
    """Return the function of an object file that has one, callable as long as it is referred to.

    Args:
        code: the object file; it must be of this machine's CPU.
        name: of the function.
        prototype: its type, of ctypes, which says whether the interpreter's lock is held in it.
    """
    instructions = _alone(code)
    mapped = None if instructions is None else _mapped(instructions)
    if mapped is None:
        memory, address = _linked(code, name)
    else:
        memory, address = mapped, np.frombuffer(mapped, np.uint8).ctypes.data
    function: Callable[..., Any] = prototype(address)
    function.memory = memory  # type: ignore[attr-defined]  # where its instructions are
    return function


def _alone(code: bytes) -> bytes | None:
    """Return the instructions of an object file, if they run as they are wherever they lie: in
    64-bit ELF, in one section that no linker must change.

    Source: System V Application Binary Interface, chapter 4 (Object Files).
    """
    if code[:6] != b"\x7fELF\x02\x01":
        return None
    (table,) = struct.unpack_from("<Q", code, 0x28)
    length, number = struct.unpack_from("<HH", code, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, table + k * length) for k in range(number)]
    found = [(k, s[4], s[5]) for k, s in enumerate(sections) if s[2] & _EXECUTABLE and s[5]]
    if len(found) != 1 or any(s[1] in _RELOCATIONS and s[7] == found[0][0] for s in sections):
        return None
    _, begin, size = found[0]
    return code[begin : begin + size]


def _mapped(instructions: bytes) -> mmap.mmap | None:
    """Return memory with instructions that can be run and not be written; None if the system does
    not give such.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = os.memfd_create("distnadam-code")
    except OSError:
        return None
    try:
        os.write(file, instructions)
        how = mmap.PROT_READ | mmap.PROT_EXEC
        return mmap.mmap(file, len(instructions), mmap.MAP_PRIVATE, how)
    except OSError:  # the system has a rule against it
        return None
    finally:
        os.close(file)


def _linked(code: bytes, name: str) -> tuple[Any, int]:
    """Return the memory into which LLVM has linked an object file, and the function's address."""
    from llvmlite import binding as llvm

    _require_executable_memory()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, engine.get_function_address(name)


def _require_executable_memory() -> None:
    """Raise OSError where the system refuses to let written memory be run: LLVM does not look, and
    the first call would end the process.
    """
    if os.name != "posix":
        return
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        how = mmap.PROT_READ | mmap.PROT_EXEC
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), how):
            number = ctypes.get_errno()
            raise OSError(number, f"memory cannot be made executable: {os.strerror(number)}")


def host_machine(cpu: str | None = None) -> Any:
    """Return LLVM's description of this machine, to make code for it; with another CPU if named."""
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name() if cpu is None else cpu,
        features=llvm.get_host_cpu_features().flatten() if cpu is None else "",
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

    These are DISTNADAM_CACHE_DIR if it is set, __pycache__ beside the source, and the user's own
    cache directory if the user has one.
    """
    found = [source.parent / "__pycache__"]
    if chosen := os.environ.get("DISTNADAM_CACHE_DIR"):
        found.insert(0, Path(chosen))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # the user may have no home
        found.append(Path(cache) / "distnadam")
    return found


def _key(sources: Sequence[Path], dtype: str) -> str:
    parts = (
        *(source.read_text() for source in (*sources, Path(__file__))),
        version("llvmlite"),
        *_processor(),
        dtype,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> Sequence[str]:
    """Return what code that was compiled for this machine's processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.partition(":")[0].strip() in _OF_THE_PROCESSOR}
    if kinds:
        return os.uname().machine, *sorted(kinds)
    from llvmlite import binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), features


def _can_write(directory: Path) -> bool:
    """Return whether files can be made in a directory, which is made if it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)


def _read(path: Path) -> bytes | None:
    """Return the code in a file; None if it is missing, damaged, kept under another name or no
    plain file, or if another user owns it or can write it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe there is not waited for
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            is_trusted = found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022
            is_plain = stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES
            raw = file.read() if is_trusted and is_plain else b""
    except OSError:
        return None
    code = raw[_SUM_BYTES:]
    return code if code and _sum(path, code) == raw[:_SUM_BYTES] else None


def _sum(path: Path, code: bytes) -> bytes:
    """Return what shows that a file is whole, and the one that was kept under this name."""
    return hashlib.sha256(path.name.encode() + b"\0" + code).digest()


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
            file.write(_sum(path, code) + code)
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)
