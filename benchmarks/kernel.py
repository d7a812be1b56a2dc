"""One Nadam step over float32 elements: ours beside the memory floor, plain NumPy and torch.

The floor is a compiled loop that moves the same 28 bytes per element (four arrays read, three
written) and adds once per array; that of two buffers writes into a fifth array, as a shard does.
All contenders are interleaved in one run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.kernels import make_stepper
from distnadam.nadam.mean import in_order
from distnadam.nadam.step_scalars import Clock, step_scalars
from distnadam.nadam.stepper import Part, RangeStep, Slots

Step = Callable[[], object]
Contenders = dict[tuple[str, int], Step]
"""One step of each contender, by name and number of threads."""
PEERS = {
    "over_floor": "memory floor",
    "over_floor_of_two": "memory floor, two buffers",
    "over_torch_foreach": "torch NAdam, foreach",
    "over_torch_fused_adam": "torch Adam, fused",
}


@dataclass(frozen=True)
class Arrays:
    """Parameters, moments and a gradient, of one length, in float32."""

    p: np.ndarray
    m: np.ndarray
    v: np.ndarray
    g: np.ndarray


def measure(n: int, rounds: int) -> tuple[list[dict[str, object]], list[str]]:
    """Return one row per contender, and a sentence for each that is not installed.

    Times are medians over `rounds` rounds, in each of which every contender runs once.
    """
    rng = np.random.default_rng(0)
    arrays = Arrays(*(rng.standard_normal(n, dtype=np.float32) for _ in range(4)))
    np.abs(arrays.v, out=arrays.v)
    contenders: Contenders = {}
    missing: list[str] = []
    for add in (add_floor, add_ours, add_naive, add_torch):
        try:
            add(contenders, arrays)
        except ImportError as error:
            missing.append(f"{add.__name__.removeprefix('add_')}: {error}")
    times = run(contenders, rounds)
    found = {key: statistics.median(t) / n * 1e9 for key, t in times.items()}
    rows: list[dict[str, object]] = []
    for (name, threads), ns in found.items():
        row: dict[str, object] = {"step": name, "threads": threads, "ns_per_element": ns}
        for column, peer in PEERS.items():
            row[column] = ns / found[peer, threads] if (peer, threads) in found else None
        rows.append(row)
    return rows, missing


def run(contenders: Contenders, rounds: int) -> dict[tuple[str, int], list[float]]:
    """Return each contender's seconds in each round, after one round of warm-up."""
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for number in range(rounds + 1):
        for key, step in contenders.items():
            began = time.perf_counter()
            step()
            if number:
                times[key].append(time.perf_counter() - began)
    return times


def add_floor(contenders: Contenders, arrays: Arrays) -> None:
    import numba

    def move(p, m, v, g):  # type: ignore[no-untyped-def]
        for i in numba.prange(p.size):
            x = g[i]
            p[i] += x
            m[i] += x
            v[i] += x

    def move_over(p, m, v, g, out):  # type: ignore[no-untyped-def]
        for i in numba.prange(p.size):
            x = g[i]
            out[i] = p[i] + x
            m[i] += x
            v[i] += x

    # arrays of its own, since it would make v negative, and ours slow with NaN
    own = [np.ones_like(arrays.p) for _ in range(5)]
    for name, loop, of in (
        ("memory floor", move, own[:4]),
        ("memory floor, two buffers", move_over, own),
    ):
        contenders[name, 1] = partial(numba.njit(loop), *of)
        contenders[name, 2] = partial(numba.njit(parallel=True)(loop), *of)
    numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))


def add_ours(contenders: Contenders, arrays: Arrays) -> None:
    scalars = step_scalars(Clock(10, 0.5), NadamConfig())
    p, m, v, g = arrays.p, arrays.m, arrays.v, arrays.g
    in_place, buffered = (
        RangeStep(slots=slots, gradients=[g], grouping=in_order(1), scalars=scalars)
        for slots in (Slots(p, m, v), Slots(p, m, v, np.ones_like(p)))
    )
    for kernel in ("numpy", "fused"):
        for threads in (1, 2):
            stepper = make_stepper(kernel, np.float32, threads)
            shares = stepper.share([Part(0, p.size)])
            for how, step in (("in place", in_place), ("two buffers", buffered)):
                contenders[f"distnadam {kernel}, {how}", threads] = partial(
                    stepper.step, step, shares
                )


def add_naive(contenders: Contenders, arrays: Arrays) -> None:
    p, m, v, g = arrays.p, arrays.m, arrays.v, arrays.g

    def step() -> None:
        m[:] = 0.9 * m + 0.1 * g
        v[:] = 0.999 * v + 0.001 * np.square(g)
        p[:] -= 0.002 * (0.1 * g * 1.01 + 0.9 * m * 1.02) / (np.sqrt(v * 1.03) + 1e-7)

    contenders["NumPy, whole arrays", 1] = step


def add_torch(contenders: Contenders, arrays: Arrays) -> None:
    import torch

    def of(make: Callable[..., torch.optim.Optimizer], threads: int, **how: object) -> Step:
        parameter = torch.nn.Parameter(torch.from_numpy(arrays.p.copy()))
        parameter.grad = torch.from_numpy(arrays.g)
        optimizer = make([parameter], **how)

        def step() -> None:
            torch.set_num_threads(threads)
            optimizer.step()

        return step

    for threads in (1, 2):
        contenders["torch NAdam, for-loop", threads] = of(torch.optim.NAdam, threads, foreach=False)
        contenders["torch NAdam, foreach", threads] = of(torch.optim.NAdam, threads, foreach=True)
        contenders["torch Adam, fused", threads] = of(torch.optim.Adam, threads, fused=True)


def report(rows: list[dict[str, object]], missing: list[str], n: int, console: Console) -> None:
    """Print the table."""
    table = Table(
        "step",
        "threads",
        "ns/element",
        *(f"x {peer}" for peer in PEERS.values()),
        title=f"one step, {n:.0e} float32 elements, medians",
    )
    for row in rows:
        ratios = (f"{row[column]:.2f}" if row[column] is not None else "-" for column in PEERS)
        table.add_row(
            str(row["step"]), str(row["threads"]), f"{row['ns_per_element']:.3f}", *ratios
        )
    console.print(table)
    for reason in missing:
        console.print(f"left out: {reason}")
