"""Both kernels against the formula written out plainly, to the bit, however the work is cut into
blocks, parts and threads.
"""

import ctypes
import os
import subprocess
import sys
import tracemalloc
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam.errors import KernelError
from distnadam.nadam.fused_loop import _refuse_helpers
from distnadam.nadam.kernels import KernelName, make_stepper
from distnadam.nadam.mean import BLOCK_BYTES, Scratch
from distnadam.nadam.norms import square_sums
from distnadam.nadam.step_scalars import Clock, StepScalars
from distnadam.nadam.stepper import Part, Slots, StepConstants, Stepper, check_denormals

SCALARS = StepScalars(0.002, 0.0011, 0.0007, 3e-9, Clock(1, 0.9))
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


def plain(
    slots: Slots, gradients: list[Any], scale: float | None, rates: StepConstants
) -> tuple[Any, Any, Any]:
    """One step as the docstring's formula says it, with temporaries, on whole arrays."""
    t = slots.p.dtype.type
    g = gradients[0].astype(t)
    for other in gradients[1:]:
        g = g + other.astype(t)
    if len(gradients) > 1:
        g = g / t(len(gradients))
    if scale is not None:
        g = g * t(scale)
    if rates.clipvalue is not None:
        limit = t(rates.clipvalue)
        g = np.minimum(np.maximum(g, -limit), limit) if limit > 0 else np.zeros_like(g)
    m = slots.m + (g - slots.m) * t(rates.one_minus_beta_1)
    v = slots.v + (g * g - slots.v) * t(rates.one_minus_beta_2)
    p = slots.p - (g * t(SCALARS.gradient) + m * t(SCALARS.momentum)) / (
        np.sqrt(v) + t(SCALARS.epsilon)
    )
    return p, m, v


@lru_cache
def stepper(kernel: KernelName, dtype: str, threads: int) -> Stepper:
    return make_stepper(kernel, dtype, threads)


@settings(max_examples=150, deadline=None)
@given(
    kernel=st.sampled_from(["numpy", "fused"]),
    dtype=st.sampled_from(DTYPES),
    size=st.one_of(st.integers(1, 5000), st.integers(-3, 3).map(lambda d: d + 10**9)),
    workers=st.integers(1, 9),
    half=st.sampled_from([None, "float16", ml_dtypes.bfloat16]),
    scale=st.sampled_from([None, 0.37, 0.0]),
    clipvalue=st.sampled_from([None, 0.5, 0.0, 1e-40]),
    threads=st.integers(1, 3),
    in_place=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_step_has_the_bits_of_the_plain_formula(
    kernel: KernelName,
    dtype: str,
    size: int,
    workers: int,
    half: Any,
    scale: float | None,
    clipvalue: float | None,
    threads: int,
    in_place: bool,
    seed: int,
) -> None:
    size = size if size < 10**8 else 2 * BLOCK[dtype] + size - 10**9  # around a block boundary
    rng = np.random.default_rng(seed)
    out = None if in_place else np.empty(size, dtype)
    slots = Slots(
        numbers(rng, size, dtype), numbers(rng, size, dtype), np.abs(numbers(rng, size, dtype)), out
    )
    gradients = [numbers(rng, size, dtype) for _ in range(workers)]
    rates = StepConstants(1.0 - 0.9, 1.0 - 0.999, clipvalue)
    with np.errstate(all="ignore"):
        if half is not None and dtype == "float32":
            gradients = [
                np.clip(g, -1e4, 1e4).astype(half) if rng.random() < 0.7 else g for g in gradients
            ]
        p, m, v = plain(slots, gradients, scale, rates)
        before, copies = slots.p.copy(), [g.copy() for g in gradients]
        cut = int(rng.integers(0, size + 1))
        stepper(kernel, dtype, threads).step(
            slots, gradients, SCALARS, rates, [Part(0, cut, scale), Part(cut, size, scale)]
        )
    got = [slots.p if slots.out is None else slots.out, slots.m, slots.v]
    assert [x.tobytes() for x in got] == [p.tobytes(), m.tobytes(), v.tobytes()]
    assert in_place or slots.p.tobytes() == before.tobytes(), "the old parameters stay"
    assert [g.tobytes() for g in gradients] == [g.tobytes() for g in copies], "the gradients stay"


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
    whole = square_sums(gradients, 0, size, Scratch(dtype))
    cut = 1024 * int(rng.integers(0, chunks))
    pieces = [
        square_sums(gradients, begin, end, Scratch(dtype)) for begin, end in ((0, cut), (cut, size))
    ]
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
    tracemalloc.start()
    stepper(kernel, "float32", 1).step(
        slots, gradients, SCALARS, StepConstants(0.1, 0.001, 0.5), [Part(0, size, 0.5)]
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * BLOCK_BYTES  # of the forty of each array


LOAD = """
import sys
from distnadam.nadam import fused
fused.warm_up("float32")
print("numba" in sys.modules)
"""


def load_fused(cache: Path) -> str:
    env = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_second_process_finds_the_loop_compiled_and_needs_no_compiler(tmp_path: Path) -> None:
    assert [load_fused(tmp_path) for _ in range(2)] == ["True\n", "False\n"]


def test_damaged_code_is_compiled_again(tmp_path: Path) -> None:
    load_fused(tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b""):
        kept.write_bytes(damaged)
        assert load_fused(tmp_path) == "True\n"
        assert kept.read_bytes() == whole


def test_code_that_cannot_be_kept_is_compiled_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert load_fused(tmp_path / "file") == "True\n"


def test_code_that_calls_into_numba_is_refused() -> None:
    _refuse_helpers("call float @llvm.sqrt.f32(float %x)\ncall float @sqrtf(float %x)")
    with pytest.raises(KernelError, match=r"its code calls NRT_incref; use kernel='numpy'"):
        _refuse_helpers("tail call void @NRT_incref(ptr %x)")


FLUSH = """
import ctypes, ctypes.util, sys
import numpy as np
from distnadam.errors import KernelError
from distnadam.nadam.stepper import check_denormals
libm = ctypes.CDLL(ctypes.util.find_library("m"))
env = (ctypes.c_ubyte * 64)()
check_denormals(np.dtype('float32'))
libm.fegetenv(ctypes.byref(env))
mxcsr = ctypes.c_uint32.from_buffer(env, 28)
mxcsr.value |= 0x8040
libm.fesetenv(ctypes.byref(env))
try:
    check_denormals(np.dtype('float32'))
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
    check_denormals(np.dtype("float32"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FLUSH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_kernel_error_is_one_of_ours() -> None:
    assert issubclass(KernelError, Exception)
