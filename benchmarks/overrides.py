"""What learning rates and betas that change at every step cost a shard: the step of a small model
in local mode with and without them, and the frame of their push.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distnadam import DistNadam
from distnadam.hyperparameters import Formula
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.codec import pack, unpack
from distnadam.protocol.messages import Push
from distnadam.protocol.round_settings import ORDINARY, RoundSettings

SHARDS, ELEMENTS, BLOCK = 8, 10_000, 100
FORMULAS: tuple[Formula, ...] = ("nadam", "adam")


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return one row for each formula: the microseconds a shard takes without and with them."""
    frames = [_median(rounds, _frame(settings)) for settings in (False, True)]
    rows = []
    for formula in FORMULAS:
        gradients = {"w": np.ones(ELEMENTS, np.float32)}
        with DistNadam(backend="local", num_shards=SHARDS, formula=formula).build(
            gradients
        ) as optimizer:
            worker = optimizer.worker(0)
            count = itertools.count()

            def plain(step: Callable[..., Any] = worker.step, g: Any = gradients) -> None:
                step(g)

            def changing(
                step: Callable[..., Any] = worker.step, g: Any = gradients, n: Any = count
            ) -> None:
                at = 1e-9 * next(n)
                step(g, lr=0.001 + at, betas=(0.9 - at, 0.999 - at))

            times: dict[Callable[[], None], list[float]] = {plain: [], changing: []}
            for _ in range(rounds):
                for step, found in times.items():
                    began = time.perf_counter()
                    for _ in range(BLOCK):
                        step()
                    found.append((time.perf_counter() - began) / BLOCK / SHARDS * 1e6)
        without, having = map(statistics.median, times.values())
        rows.append(
            {
                "formula": formula,
                "plain_us": without + frames[0],
                "changing_us": having + frames[1],
                "more_us": having + frames[1] - without - frames[0],
            }
        )
    return rows


def _frame(overrides: bool) -> Callable[[], object]:
    """Return what packs and unpacks a push."""
    flat = {"float32": np.ones(ELEMENTS // SHARDS, np.float32)}
    settings = ORDINARY
    if overrides:
        settings = RoundSettings(overrides=packed_overrides(0.1, (0.9, 0.99), None))
    push = Push(epoch=1, rank=0, incarnation=1, round=1, gradients=flat, settings=settings)
    return lambda: unpack(pack(1, push)[4:], lambda _: flat)


def _median(rounds: int, work: Callable[[], object]) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(BLOCK):
            work()
        found.append((time.perf_counter() - began) / BLOCK * 1e6)
    return statistics.median(found)


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(
        "formula",
        "us a shard",
        "with rates of each step",
        "more",
        title=f"a step of {ELEMENTS} parameters on {SHARDS} shards, and its push's frame, medians",
    )
    for row in rows:
        figures = (row["plain_us"], row["changing_us"], row["more_us"])
        table.add_row(row["formula"], *(f"{figure:.1f}" for figure in figures))
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    report(measure(parser.parse_args().rounds), Console(width=110))
