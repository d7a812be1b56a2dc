"""Runs the benchmarks: prints the tables, and writes them as JSON and a picture."""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import checkpoint, kernel, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--elements",
        type=lambda text: int(float(text)),
        default=50_000_000,
        help="of the kernel's arrays",
    )
    parser.add_argument("--kernel-rounds", type=int, default=7)
    parser.add_argument("--step-rounds", type=int, default=2)
    parser.add_argument("--checkpoint-rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=list(step.SIZES), choices=list(step.SIZES))
    parser.add_argument(
        "--curves", action="store_true", help="also 1 to 16 shards and 1 to 8 workers"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    console = Console(width=110)
    kernels, left_out = kernel.measure(args.elements, args.kernel_rounds)
    kernel.report(kernels, left_out, args.elements, console)
    steps = step.measure(args.step_rounds, args.sizes)
    step.report(steps, console)
    curves = step.curves() if args.curves else []
    if curves:
        table = Table(
            "shards", "workers", "ms", title=f"1e7 elements, views, on {os.cpu_count()} cores"
        )
        for row in curves:
            table.add_row(str(row["shards"]), str(row["workers"]), f"{row['ms']:.2f}")
        console.print(table)
    checkpoints, left_out = checkpoint.measure(args.elements, args.checkpoint_rounds)
    checkpoint.report(checkpoints, left_out, args.elements, console)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    found = {
        "machine": machine,
        "kernel": kernels,
        "step": steps,
        "curves": curves,
        "checkpoint": checkpoints,
    }
    (args.out / "bench.json").write_text(json.dumps(found, indent=1))
    draw(kernels, steps, args.out / "bench.png")
    console.print(f"written: {args.out / 'bench.json'}, {args.out / 'bench.png'}")


def draw(kernels: list[dict[str, object]], steps: list[dict[str, object]], path: Path) -> None:
    """Draw the kernels as bars and the steps as lines over the elements."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{row['step']} ({row['threads']} thr.)" for row in kernels]
    left.barh(names, [float(str(row["ns_per_element"])) for row in kernels])
    left.set(xlabel="ns per element", title="one Nadam step")
    left.invert_yaxis()
    for name in dict.fromkeys(str(row["step"]) for row in steps):
        line = [
            (float(str(row["elements"])), float(str(row["ms"])))
            for row in steps
            if row["step"] == name
        ]
        right.loglog(*zip(*line, strict=True), marker="o", label=name)
    right.set(
        xlabel="parameters", ylabel="ms per step", title="one synchronous step, 2 workers, 2 shards"
    )
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
