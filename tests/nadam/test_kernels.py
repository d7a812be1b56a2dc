"""Both kernels against the formula written out plainly, to the bit, however the work is cut into
blocks, parts and threads.
"""

import ctypes
import mmap
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from functools import lru_cache, reduce
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding as llvm

from distnadam.errors import KernelError
from distnadam.nadam import fused_stepper, object_code
from distnadam.nadam.fused_abi import ENTRY, PROTOTYPE
from distnadam.nadam.fused_loop import compile_loop
from distnadam.nadam.kernels import KernelName, make_stepper
from distnadam.nadam.mean import BLOCK_BYTES, Grouping, Scratch, in_order
from distnadam.nadam.norms import square_sums
from distnadam.nadam.object_code import cached_code, host_machine, loaded_code
from distnadam.nadam.step_scalars import NONE, Clock, StepScalars
from distnadam.nadam.stepper import Part, RangeStep, Slots, Stepper, check_denormals
from distnadam.tensors.arrays import BFLOAT16


def numbers_of(
    c_g: float = 0.0011, decay: float = NONE, l2: float = NONE, limit: float = NONE
) -> tuple[float, ...]:
    """The coefficients of one setting."""
    return c_g, 0.0007, 3e-9, 1.0 - 0.9, 1.0 - 0.999, decay, l2, limit


def scalars(*settings: tuple[float, ...]) -> StepScalars:
    numbers = sum(settings, ())
    return StepScalars(lr=0.002, coefficients=numbers, after=Clock(1, 0.9))


SCALARS = scalars(numbers_of())
DTYPES = ["float32", "float64"]
BLOCK = {dtype: BLOCK_BYTES // np.dtype(dtype).itemsize for dtype in DTYPES}


def numbers(rng: np.random.Generator, n: int, dtype: str) -> Any:
    """Values over the whole range whose squares stay finite, denormals and zeros of both signs
    among them.
    """
    info = np.finfo(dtype)
    exponents = rng.integers(info.minexp - info.nmant, info.maxexp // 2 - 4, n)
    values = np.ldexp(rng.uniform(-2, 2, n), exponents).astype(dtype)
    values[rng.random(n) < 0.05] = 0.0
    values[rng.random(n) < 0.05] = -0.0
    return values


def plain(step: RangeStep, scale: float, numbers: tuple[float, ...]) -> tuple[Any, Any, Any]:
    """One step as the docstring's formula says it, with temporaries, on whole arrays."""
    slots, t = step.slots, step.slots.p.dtype.type
    c_g, c_m, epsilon, k_1, k_2, decay, l2, limit = map(t, numbers)
    wide = iter([gradient.astype(t) for gradient in step.gradients])
    groups = [reduce(np.add, islice(wide, size)) for size in step.grouping.sizes]
    g = reduce(np.add, groups)
    if step.grouping.count > 1:
        g = g / t(step.grouping.count)
    if not np.isnan(scale):
        g = g * t(scale)
    if not np.isnan(limit):
        g = np.minimum(np.maximum(g, -limit), limit) if limit > 0 else np.zeros_like(g)
    g = g if np.isnan(l2) else g + slots.p * l2
    m = slots.m + (g - slots.m) * k_1
    v = slots.v + (g * g - slots.v) * k_2
    along = m * c_m if np.isnan(c_g) else g * c_g + m * c_m
    less = along / (np.sqrt(v) + epsilon)
    p = slots.p - (less if np.isnan(decay) else slots.p * decay + less)
    return p, m, v


SETTINGS = st.builds(
    numbers_of,
    c_g=st.sampled_from([NONE, 0.0011]),
    decay=st.sampled_from([NONE, 0.02]),
    l2=st.sampled_from([NONE, 0.01]),
    limit=st.sampled_from([NONE, 0.5, 0.0, 1e-40]),
)


CPUS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
"""Kinds of processors, with vectors of 16, 32 and 64 bytes, and what they have."""
KERNELS = [
    "numpy",
    "fused",
    *(cpu for cpu, feature in CPUS.items() if llvm.get_host_cpu_features().get(feature)),
]
"""The kernels, and the fused one as it is compiled for other processors that this one can be."""


@lru_cache
def stepper(kernel: Any, dtype: str, threads: int) -> Stepper:
    if kernel not in CPUS:
        return make_stepper(kernel, dtype, threads)
    fused = fused_stepper.FusedStepper(dtype, threads)
    fused._loop = loaded_code(compile_loop(dtype, kernel), ENTRY, PROTOTYPE)
    return fused


@settings(max_examples=150, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from(DTYPES),
    size=st.one_of(st.integers(1, 5000), st.integers(-3, 3).map(lambda d: d + 10**9)),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    half=st.sampled_from([None, "float16", ml_dtypes.bfloat16]),
    scales=st.lists(st.sampled_from([NONE, 0.37, 0.0, -1.0]), min_size=2, max_size=2),
    settings=st.lists(SETTINGS, min_size=2, max_size=2),
    threads=st.integers(1, 3),
    in_place=st.booleans(),
    rounds=st.booleans(),
    streams=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_step_has_the_bits_of_the_plain_formula(
    kernel: str,
    dtype: str,
    size: int,
    groups: list[int],
    half: Any,
    scales: list[float],
    settings: list[tuple[float, ...]],
    threads: int,
    in_place: bool,
    rounds: bool,
    streams: bool,
    seed: int,
) -> None:
    size = size if size < 10**8 else 2 * BLOCK[dtype] + size - 10**9  # around a block boundary
    rng = np.random.default_rng(seed)

    def placed(values: Any) -> Any:
        """The values at any distance from a line of the cache."""
        memory = np.empty(size + 64, values.dtype)
        offset = int(rng.integers(0, 64))
        memory[offset : offset + size] = values
        return memory[offset : offset + size]

    out = None if in_place else placed(np.zeros(size, dtype))
    rounded = placed(np.zeros(size, BFLOAT16)) if rounds and dtype == "float32" else None
    p, m, v = (placed(numbers(rng, size, dtype)) for _ in range(3))
    elsewhere = seed % 2 == 0  # where new moments go too
    moments_out = [placed(np.zeros(size, dtype)) if elsewhere else None for _ in range(2)]
    slots = Slots(p, m, np.abs(v, out=v), out, rounded, None, *moments_out)
    gradients = [placed(numbers(rng, size, dtype)) for _ in range(sum(groups))]
    count = sum(groups) + (2 if seed % 3 == 0 else 0)  # a gradient may be a sum already
    with np.errstate(all="ignore"):
        if half is not None and dtype == "float32":
            gradients = [
                np.clip(g, -1e4, 1e4).astype(half) if rng.random() < 0.7 else g for g in gradients
            ]
        step = RangeStep(
            slots=slots,
            gradients=gradients,
            grouping=Grouping(tuple(groups), count),
            scalars=scalars(*settings),
            scales=scales,
        )
        ways = [plain(step, scales[k], settings[k]) for k in range(2)]
        half = None if rounded is None else rounded.copy()
        got = [slots.written, *slots.moments_out]
        held = [x.copy() for x in got]
        kept = [old for old, new in zip((p, m, v), got, strict=True) if new is not old]
        before, copies = [x.copy() for x in kept], [g.copy() for g in gradients]
        borders = np.sort(rng.integers(0, size + 1, int(rng.integers(2, 9)))).tolist()
        parts = [Part(a, b, k % 2, k % 2) for k, (a, b) in enumerate(pairwise(borders))]
        parts = [part for part in parts if rng.random() < 0.8]  # what lies between stays
        how = stepper(kernel, dtype, threads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_stepper, "STREAMED_BYTES", 0 if streams else 1 << 40)
            how.step(step, how.share(parts))
        for part in parts:
            stepped = slice(part.begin, part.end)
            for array, new in zip(held, ways[part.setting], strict=True):
                array[stepped] = new[stepped]
            if rounded is not None:
                half[stepped] = ways[part.setting][0][stepped].astype(BFLOAT16)
    assert [x.tobytes() for x in got] == [x.tobytes() for x in held]
    assert rounded is None or rounded.tobytes() == half.tobytes()
    assert [x.tobytes() for x in kept] == [x.tobytes() for x in before], "the old arrays stay"
    assert [g.tobytes() for g in gradients] == [g.tobytes() for g in copies], "the gradients stay"


def nearest_even(values: Any) -> Any:
    """bfloat16 as IEEE 754 rounds, by float64's exact arithmetic; NaN is quiet, with its sign."""
    wide = np.abs(values.astype(np.float64))
    exponent = np.maximum(np.frexp(wide)[1] - 8, -133)  # of the last of eight digits
    units = np.rint(np.ldexp(wide, -exponent))
    largest = float(ml_dtypes.finfo(BFLOAT16).max)
    found = np.where(np.ldexp(units, exponent) > largest, np.inf, np.ldexp(units, exponent))
    return np.copysign(np.where(np.isnan(values), np.nan, found), values).astype(BFLOAT16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounded_parameters_are_the_nearest_even_ones_over_the_whole_range(
    kernel: str,
) -> None:
    """Every bfloat16 that there is, and what lies around and half-way to the next."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    p = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | low).reshape(-1).view(np.float32)
    assert {0x7F7FFFFF, 0x7F800001, 0xFFC08000, 0x00008000} <= set(p.view(np.uint32).tolist())
    zeros = [np.zeros_like(p) for _ in range(3)]
    slots = Slots(p.copy(), zeros[0], zeros[1], None, np.empty(p.size, BFLOAT16))
    assert slots.rounded is not None
    how = stepper(kernel, "float32", 2)
    step = RangeStep(slots=slots, gradients=[zeros[2]], grouping=in_order(1), scalars=SCALARS)
    how.step(step, how.share([Part(0, p.size)]))  # of a gradient of zeros: p stays
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(slots.p, p)
        assert slots.rounded.tobytes() == nearest_even(p).tobytes() == p.astype(BFLOAT16).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    chunks=st.integers(1, 300),
    tail=st.integers(0, 1023),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_square_sums_do_not_depend_on_where_the_range_is_cut(
    dtype: str, chunks: int, tail: int, workers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = 1024 * chunks - tail
    gradients = [rng.standard_normal(size).astype(dtype) for _ in range(workers)]
    grouping = in_order(workers)
    (whole,) = square_sums(gradients, grouping, [(0, size)], Scratch(dtype))
    cuts = [0, *np.unique(1024 * rng.integers(0, chunks, 5)).tolist(), size]
    pieces = square_sums(gradients, grouping, list(pairwise(cuts)), Scratch(dtype))
    assert [len(piece) for piece in pieces] == [-(-(b - a) // 1024) for a, b in pairwise(cuts)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    mean = (
        sum(gradients[1:], gradients[0]) / np.dtype(dtype).type(workers)
        if workers > 1
        else gradients[0]
    )
    np.testing.assert_allclose(whole.sum(), np.square(mean.astype(np.float64)).sum(), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_allocates_nothing_of_the_ranges_size(kernel: KernelName, half: bool) -> None:
    size = 40 * BLOCK["float32"]
    slots = Slots(*(np.ones(size, np.float32) for _ in range(3)), np.empty(size, np.float32))
    gradients = [np.ones(size, np.float16 if half else np.float32) for _ in range(3)]
    step = RangeStep(
        slots=slots,
        gradients=gradients,
        grouping=Grouping((1, 2), 3),
        scalars=scalars(numbers_of(limit=0.5)),
        scales=[0.5],
    )
    how = stepper(kernel, "float32", 1)  # compiled before, if it must be
    tracemalloc.start()
    how.step(step, [[Part(0, size)]])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * BLOCK_BYTES  # of the forty of each array


LOAD = """
import sys
from distnadam.nadam import fused
fused.load_loop(sys.argv[1])
print(*sorted({"numba", "llvmlite"} & set(sys.modules)))
"""


def load_fused(cache: Path, dtype: str = "float32") -> str:
    """Return which compilers a new process has in memory once it has the loop."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, dtype],
        env=os.environ | {"DISTNADAM_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_process_finds_the_loop_compiled_and_needs_no_compiler(
    dtype: str, tmp_path: Path
) -> None:
    assert load_fused(tmp_path, dtype) == "llvmlite"
    on_linux = sys.platform == "linux"  # elsewhere LLVM links it
    assert load_fused(tmp_path, dtype) == ("" if on_linux else "llvmlite")


@pytest.mark.nightly
def test_damaged_code_is_compiled_again(tmp_path: Path) -> None:
    load_fused(tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b""):
        kept.write_bytes(damaged)
        assert load_fused(tmp_path) == "llvmlite"
        assert kept.read_bytes() == whole


class Compiler:
    """Counts how often it compiles the code of a source that a test writes."""

    def __init__(self, directory: Path) -> None:
        self.sources = [directory / "loop.py", directory / "abi.py"]
        for source in self.sources:
            source.write_text("one")
        self.compiled = 0

    def code(self) -> bytes:
        return cached_code(self.sources, "float32", self._compile)

    def _compile(self) -> bytes:
        self.compiled += 1
        return b"code"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler whose code is kept beside its source, and which has no other place for it."""
    monkeypatch.delenv("DISTNADAM_CACHE_DIR", raising=False)
    (tmp_path / "no directory").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no directory"))
    package = tmp_path / "package"
    package.mkdir()
    return Compiler(package)


def test_code_is_compiled_again_when_any_of_its_sources_changes(compiler: Compiler) -> None:
    for number, source in enumerate(compiler.sources, 2):
        assert compiler.code() == compiler.code() == b"code"
        source.write_text("two")
        compiler.code()
        assert compiler.compiled == number


def test_code_that_cannot_be_kept_is_compiled_each_time(compiler: Compiler) -> None:
    (compiler.sources[0].parent / "__pycache__").write_bytes(b"")
    assert compiler.code() == compiler.code() == b"code"
    assert compiler.compiled == 2


def test_where_one_directory_cannot_be_written_the_next_keeps_the_code(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTNADAM_CACHE_DIR", str(tmp_path / "no directory"))
    beside = compiler.sources[0].parent / "__pycache__"
    compiler.code()
    assert len(list(beside.iterdir())) == 1
    shutil.rmtree(beside)
    beside.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler.code()
    compiler.code()
    assert compiler.compiled == 2
    assert len(list((tmp_path / "cache" / "distnadam").iterdir())) == 1


def test_other_users_may_read_kept_code_and_only_its_owner_writes_it(compiler: Compiler) -> None:
    before = os.umask(0)
    try:
        compiler.code()
    finally:
        os.umask(before)
    (kept,) = (compiler.sources[0].parent / "__pycache__").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away, as only root can")
def test_code_that_belongs_to_another_user_is_not_loaded(compiler: Compiler) -> None:
    compiler.code()
    (kept,) = (compiler.sources[0].parent / "__pycache__").iterdir()
    os.chown(kept, 12345, -1)
    compiler.code()
    assert compiler.compiled == 2
    assert kept.stat().st_uid == 0


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from distnadam.nadam.object_code import cached_code
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # it would be cut, for all who import it later
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
assert cached_code([Path(sys.argv[1])], "float32", lambda: bytes(1000)) == bytes(1000)
"""


def test_a_file_that_cannot_be_written_to_its_end_is_removed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = tmp_path / "loop.py"
    source.write_text("")
    env = os.environ | {"DISTNADAM_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", FULL_DISK, str(source)], env=env, check=True)
    assert list(cache.iterdir()) == []


FALL_BACK = """
import sys
from distnadam.nadam.kernels import make_stepper
sys.modules["llvmlite.ir"] = None
print(type(make_stepper("auto", "float32")).__name__)
make_stepper("auto", "float32")
try:
    make_stepper("fused", "float32")
except Exception as error:
    print(type(error).__name__)
"""


def test_where_the_loop_cannot_be_compiled_numpy_steps_unless_it_was_asked_for(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FALL_BACK],
        env=os.environ | {"DISTNADAM_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["NumPyStepper", "KernelError"]
    assert done.stderr.count("the NumPy kernel steps instead") == 1


ADDING = """
@one = constant i64 1
define void @adding(ptr %number) {{
    %old = load i64, ptr %number
    {one}
    %new = add i64 %old, %one
    store i64 %new, ptr %number
    ret void
}}
"""


@pytest.mark.parametrize("one", ["%one = add i64 0, 1", "%one = load i64, ptr @one"])
def test_code_runs_as_it_is_or_linked_where_it_refers_to_its_own_data(one: str) -> None:
    code = host_machine().emit_object(llvm.parse_assembly(ADDING.format(one=one)))
    number = ctypes.c_int64(41)
    loaded_code(code, "adding", ctypes.CFUNCTYPE(None, ctypes.c_void_p))(ctypes.addressof(number))
    assert number.value == 42


@pytest.mark.parametrize("missing", ["memfd_create", "memory that can be run"])
def test_where_the_system_maps_no_code_it_is_linked(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    anonymous = mmap.mmap

    def refuse(file: int, *rest: Any) -> Any:
        if file >= 0:
            raise OSError("refused")
        return anonymous(file, *rest)

    if missing == "memfd_create":
        monkeypatch.delattr(os, missing)
    else:
        monkeypatch.setattr("distnadam.nadam.object_code.mmap.mmap", refuse)
    test_code_runs_as_it_is_or_linked_where_it_refers_to_its_own_data("%one = add i64 0, 1")


REFUSED = """
import ctypes, os, sys
from distnadam.errors import KernelError
from distnadam.nadam.kernels import make_stepper
del os.memfd_create
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, as systemd's MemoryDenyWriteExecute
    sys.exit(77)
assert type(make_stepper("auto", "float32")).__name__ == "NumPyStepper"
try:
    make_stepper("fused", "float32")
except KernelError as error:
    assert "memory cannot be made executable" in str(error), error
else:
    sys.exit(1)
"""


def test_where_no_memory_may_be_made_executable_numpy_steps_and_fused_is_refused() -> None:
    status = subprocess.run([sys.executable, "-c", REFUSED], timeout=60).returncode
    if status == 77:
        pytest.skip("this kernel cannot deny it")
    assert status == 0


@pytest.mark.parametrize("what", ["pipe", "endless", "writable by others", "another's name"])
def test_a_cached_file_that_cannot_be_trusted_is_not_read(what: str, tmp_path: Path) -> None:
    path, kept = tmp_path / "code.o", tmp_path / "kept.o"
    object_code._write(kept, b"some code")
    assert object_code._read(kept) == b"some code"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "endless":
        path.symlink_to("/dev/zero")
    elif what == "writable by others":
        object_code._write(path, b"some code")
        path.chmod(0o646)
    else:
        kept.rename(path)
    assert object_code._read(path) is None


FLUSH = """
import ctypes, ctypes.util, sys
import numpy as np
from distnadam.errors import KernelError
from distnadam.nadam.stepper import check_denormals
libm = ctypes.CDLL(ctypes.util.find_library("m"))
env = (ctypes.c_ubyte * 64)()
check_denormals()
libm.fegetenv(ctypes.byref(env))
mxcsr = ctypes.c_uint32.from_buffer(env, 28)
mxcsr.value |= 0x8040
libm.fesetenv(ctypes.byref(env))
try:
    check_denormals()
except KernelError as error:
    sys.exit(0 if "flushes denormal numbers to zero" in str(error) else 2)
sys.exit(1)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "fegetenv") and sys.platform != "linux", reason="needs glibc"
)
def test_a_thread_that_flushes_denormals_is_refused() -> None:
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("sets the x86 control register")
    check_denormals()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FLUSH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_kernel_error_is_one_of_ours() -> None:
    assert issubclass(KernelError, Exception)
