"""One synchronous step, from "gradient ready" to "new parameters read": ours beside its peers, and
beside the time of the bytes of a step with views.

There are 2 workers with one thread each. Every contender is a program of its own (`contenders/`),
started again in each round, so that slow periods of the machine affect all of them.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

SIZES = {"1e4": 1000, "1e5": 500, "1e6": 150, "1e7": 30, "5e7": 12}
"""Steps that a program makes, by number of elements."""

OURS = {
    "distnadam, copying": ["ours", "--mode", "copy"],
    "distnadam, views": ["ours", "--mode", "views"],
    "distnadam, views, unchecked": ["ours", "--mode", "views", "--unchecked"],
    "distnadam, NumPy kernel": ["ours", "--mode", "copy", "--kernel", "numpy"],
    "distnadam, Ray objects": ["ours", "--mode", "copy", "--transport", "objects"],
}
PEERS = {
    "torch all-reduce + NAdam foreach": ["torch_ranks"],
    "torch ZeroRedundancyOptimizer + NAdam": ["torch_ranks", "--zero"],
    "Ray's documented parameter server": ["ray_server"],
}
FLOOR = "memory floor, (8W + 24) bytes a parameter"


def measure(rounds: int, sizes: list[str]) -> list[dict[str, Any]]:
    """Return one row per contender and size: its median milliseconds over all rounds."""
    rows = []
    for size in sizes:
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, command in (OURS | PEERS | {FLOOR: ["floor"]}).items():
                times.setdefault(name, []).extend(seconds(command, size, SIZES[size]))
        best = min(statistics.median(times[name]) for name in PEERS)
        floor = statistics.median(times[FLOOR])
        for name, found in times.items():
            median = statistics.median(found)
            rows.append(
                {
                    "step": name,
                    "elements": size,
                    "ms": median * 1e3,
                    "peers_best_over_this": best / median,
                    "over_floor": median / floor,
                }
            )
    return rows


def seconds(command: list[str], elements: str, steps: int) -> list[float]:
    """Run one contender and return its steps' seconds, without the first fifth.

    Raises:
        RuntimeError: it failed; the message ends with its standard error.
    """
    program, *how = command
    argv = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"benchmarks.contenders.{program}",
        "--elements",
        elements,
        "--steps",
        str(steps),
        *how,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stderr[-2000:]}")
    times: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return times[len(times) // 5 :]


def curves() -> list[dict[str, Any]]:
    """Return the step of 1e7 elements for several numbers of shards and workers.

    More of them than the machine has cores show the cost of oversubscription.
    """
    rows = []
    for shards, workers in [
        (1, 1),
        (1, 2),
        (2, 2),
        (4, 2),
        (8, 2),
        (16, 2),
        (2, 1),
        (2, 4),
        (2, 8),
    ]:
        found = seconds(
            ["ours", "--mode", "views", "--shards", str(shards), "--workers", str(workers)],
            "1e7",
            20,
        )
        rows.append(
            {
                "shards": shards,
                "workers": workers,
                "elements": "1e7",
                "ms": statistics.median(found) * 1e3,
            }
        )
    return rows


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table of steps."""
    table = Table(
        "step",
        "elements",
        "ms",
        "peers' best / this",
        "x memory floor",
        title="one synchronous step, 2 workers, 2 shards, medians",
    )
    for row in rows:
        figures = row["peers_best_over_this"], row["over_floor"]
        table.add_row(
            row["step"], row["elements"], f"{row['ms']:.3f}", *(f"{each:.2f}" for each in figures)
        )
    console.print(table)
