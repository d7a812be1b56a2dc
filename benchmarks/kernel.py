"""One Nadam step over float32 elements: ours beside the memory floor, plain NumPy and torch, interleaved in one run.

The floor is a compiled loop that moves the same 28 bytes per element (four arrays read, three written) and adds once per array.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from distnadam.config import NadamConfig
from distnadam.nadam.kernels import Part, Rates, Slots, Stepper
from distnadam.nadam.schedule import Clock, step_scalars

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=50_000_000)
    parser.add_argument("--rounds", type=int, default=7, help="each contender runs once per round, in turn")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    n = args.elements
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(n, dtype=np.float32) for _ in range(4)]
    np.abs(arrays[2], out=arrays[2])
    p, m, v, g = arrays
    contenders: dict[tuple[str, int], Step] = {}
    missing: list[str] = []
    for add in (add_floor, add_ours, add_naive, add_torch):
        try:
            add(contenders, p, m, v, g)
        except ImportError as error:
            missing.append(f"{add.__name__.removeprefix('add_')}: {error}")
    times = measure(contenders, args.rounds)
    rows = [
        {"step": name, "threads": threads, "ns_per_element": statistics.median(t) / n * 1e9, "best_ns_per_element": min(t) / n * 1e9}
        for (name, threads), t in times.items()
    ]
    report(rows, missing, n, args.out)


def measure(contenders: dict[tuple[str, int], Step], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Return seconds of each contender in each round, after one round that does not count."""
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for number in range(rounds + 1):
        for key, step in contenders.items():
            began = time.perf_counter()
            step()
            if number:
                times[key].append(time.perf_counter() - began)
    return times


def add_floor(contenders: dict[tuple[str, int], Step], p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray) -> None:
    import numba

    def move(p, m, v, g):  # type: ignore[no-untyped-def]
        for i in numba.prange(p.size):
            x = g[i]
            p[i] += x
            m[i] += x
            v[i] += x

    one, several = numba.njit(move), numba.njit(parallel=True)(move)
    own = [np.ones_like(p) for _ in range(4)]  # it would make v negative, and ours slow with NaN
    contenders["memory floor", 1] = lambda: one(*own)
    contenders["memory floor", 2] = lambda: several(*own)
    numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))


def add_ours(contenders: dict[tuple[str, int], Step], p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray) -> None:
    config = NadamConfig()
    scalars = step_scalars(Clock(10, 0.5), config)
    rates = Rates(1 - config.beta_1, 1 - config.beta_2)
    slots, part = Slots(p, m, v), [Part(0, p.size)]
    buffered, buffer = Slots(p, m, v, np.ones_like(p)), p.size
    for threads in (1, 2):
        stepper = Stepper(np.float32, threads)
        contenders["distnadam, in place", threads] = lambda s=stepper: s.step(slots, [g], scalars, rates, part)
        contenders["distnadam, two buffers", threads] = lambda s=stepper: s.step(buffered, [g], scalars, rates, [Part(0, buffer)])


def add_naive(contenders: dict[tuple[str, int], Step], p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray) -> None:
    def step() -> None:
        m[:] = 0.9 * m + 0.1 * g
        v[:] = 0.999 * v + 0.001 * np.square(g)
        p[:] -= 0.002 * (0.1 * g * 1.01 + 0.9 * m * 1.02) / (np.sqrt(v * 1.03) + 1e-7)

    contenders["NumPy, whole arrays", 1] = step


def add_torch(contenders: dict[tuple[str, int], Step], p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray) -> None:
    import torch

    def of(make: Callable[..., torch.optim.Optimizer], threads: int, **how: object) -> Step:
        parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
        parameter.grad = torch.from_numpy(g)
        optimizer = make([parameter], **how)

        def step() -> None:
            torch.set_num_threads(threads)
            optimizer.step()

        return step

    for threads in (1, 2):
        contenders["torch NAdam, for-loop", threads] = of(torch.optim.NAdam, threads, foreach=False)
        contenders["torch NAdam, foreach", threads] = of(torch.optim.NAdam, threads, foreach=True)
        contenders["torch Adam, fused", threads] = of(torch.optim.Adam, threads, fused=True)


def report(rows: list[dict[str, object]], missing: list[str], n: int, out: Path) -> None:
    """Print one table and write it as JSON."""
    found = {(row["step"], row["threads"]): float(str(row["ns_per_element"])) for row in rows}
    table = Table("step", "threads", "ns/element", "x floor", "x torch NAdam foreach", title=f"one step, {n:.0e} float32 elements, medians")
    for row in rows:
        threads, ns = row["threads"], float(str(row["ns_per_element"]))
        ratios = [found.get((peer, threads)) for peer in ("memory floor", "torch NAdam, foreach")]
        row["over_floor"], row["over_torch_foreach"] = (ns / r if r else None for r in ratios)
        table.add_row(str(row["step"]), str(threads), f"{ns:.3f}", *(f"{ns / r:.2f}" if r else "-" for r in ratios))
    console = Console()
    console.print(table)
    for reason in missing:
        console.print(f"left out: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernel.json").write_text(
        json.dumps({"elements": n, "python": platform.python_version(), "numpy": np.__version__, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
