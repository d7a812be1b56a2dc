"""A step in one process: `apply_gradients` and `worker.step` of a local optimizer beside torch's
NAdam and the memory floor; 60,000 tensors beside one; what weight decay, formulas and groups cost,
an import, and a loop of `fit`.

    .venv-bench/bin/python -m benchmarks.local
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.kernel import Arrays, Contenders, add_floor
from distnadam import DistNadam, Group, Options, fit

SIZES = {10**4: 2000, 10**5: 800, 10**6: 150, 5 * 10**7: 7}
"""Steps of each contender, by number of elements."""
TORCH = "torch NAdam, foreach"
FLOOR = "memory floor"
MANY, EACH = 60_000, 10
"""Tensors of the model of many, and elements of each."""
FIT_STEPS = 1500

Step = Callable[[], object]


def timed(steps: dict[str, Step], count: int) -> dict[str, float]:
    """Return the median seconds of each step; they take turns, each a tenth of `count` at a time,
    after one of those as a warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    a_turn = max(1, count // 10)
    for turn in range(11):
        for name, step in steps.items():
            for _ in range(a_turn):
                began = time.perf_counter()
                step()
                if turn:
                    times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def optimizer_of(params: dict[str, np.ndarray]) -> DistNadam:
    return DistNadam(backend="local", options=Options(threads=1)).build(params)


def torch_step(gradients: Iterable[np.ndarray]) -> Step:
    import torch

    torch.set_num_threads(1)
    parameters = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(gradient.size))
        parameter.grad = torch.from_numpy(gradient)
        parameters.append(parameter)
    return torch.optim.NAdam(parameters, foreach=True).step


def floor_step(elements: int) -> Step:
    contenders: Contenders = {}
    add_floor(contenders, Arrays(*(np.ones(elements, np.float32) for _ in range(4))))
    return contenders["memory floor", 1]


def steps_by_size(elements: int, count: int, tensors: int) -> list[dict[str, Any]]:
    """Return a row for each way of one step of so many elements in all, in so many tensors of one
    size, one thread each.
    """
    rng, each = np.random.default_rng(0), elements // tensors
    tree = {f"{i:02d}": rng.standard_normal(each, dtype=np.float32) for i in range(tensors)}
    zeros = {path: np.zeros(each, np.float32) for path in tree}
    direct, pushed = optimizer_of(zeros), optimizer_of(zeros)
    worker = pushed.worker(0)
    viewed = optimizer_of(zeros)
    viewer = viewed.worker(0)
    for path, view in viewer.gradients().items():
        view[:] = tree[path]
    steps: dict[str, Step] = {
        "apply_gradients": lambda: direct.apply_gradients(tree),
        "worker.step": lambda: worker.step(tree),
        "worker.step, views": viewer.step,
        TORCH: torch_step(tree.values()),
        FLOOR: floor_step(elements),
    }
    found = timed(steps, count)
    for optimizer in (direct, pushed, viewed):
        optimizer.close()
    return [
        {
            "step": name,
            "elements": elements,
            "tensors": tensors,
            "us": seconds * 1e6,
            "over_floor": seconds / found[FLOOR],
            "torch_over_this": found[TORCH] / seconds,
        }
        for name, seconds in found.items()
    ]


def many_tensors() -> list[dict[str, Any]]:
    """Return the step of many small tensors beside one of as many elements."""
    rows = []
    for how in ("copying", "views"):
        optimizers, steps = [], {}
        for number in (1, MANY):
            size = MANY * EACH // number
            tree = {f"{i:05d}": np.full(size, 0.01, np.float32) for i in range(number)}
            optimizer = optimizer_of({path: np.zeros(size, np.float32) for path in tree})
            optimizers.append(optimizer)
            worker = optimizer.worker(0)
            for view in worker.gradients().values() if how == "views" else ():
                view[:] = 0.01
            given = (tree,) if how == "copying" else ()
            steps[str(number)] = partial(worker.step, *given)
        one_s, many_s = timed(steps, 300).values()
        for optimizer in optimizers:
            optimizer.close()
        rows.append(
            {
                "step": how,
                "one_ms": one_s * 1e3,
                "many_ms": many_s * 1e3,
                "many_over_one": many_s / one_s,
            }
        )
    return rows


LACKING = "half absent"
"""The clocks of tensors of which half have no gradient."""


def settings() -> list[dict[str, Any]]:
    """Return the step with weight decay, other formulas, groups and clocks beside the step without;
    once half of the elements have no gradient.
    """
    bias, rest = Group("*/bias", weight_decay=0.0), Group("*/kernel", lr_scale=0.5)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "decoupled decay": {"weight_decay": 0.01},
        "L2": {"weight_decay": 0.01, "decoupled_weight_decay": False},
        "Adam": {"formula": "adam"},
        "two groups": {"weight_decay": 0.01, "groups": [bias, rest]},
        "betas of a group": {"groups": [Group("*/bias", beta_1=0.8, beta_2=0.99)]},
        "clocks of tensors": {"clocks": "tensor"},
        LACKING: {"clocks": "tensor"},
    }
    rows = []
    for number, size, count in ((2, 5 * 10**6, 30), (200, 50, 1000)):
        rng = np.random.default_rng(0)
        tree = {
            f"{i:03d}": {name: rng.standard_normal(size, np.float32) for name in ("bias", "kernel")}
            for i in range(number // 2)
        }
        made = {
            kind: DistNadam(backend="local", options=Options(threads=1), **given).build(tree)
            for kind, given in kinds.items()
        }
        few = {name: {**each, "bias": None} for name, each in tree.items()}
        found = timed(
            {
                kind: partial(each.apply_gradients, few if kind == LACKING else tree)
                for kind, each in made.items()
            },
            count,
        )
        for each in made.values():
            each.close()
        rows += [
            {
                "settings": kind,
                "tensors": number,
                "elements": number * size,
                "us": seconds * 1e6,
                "over_plain": seconds / found["plain"],
            }
            for kind, seconds in found.items()
        ]
    return rows


def imports() -> list[dict[str, Any]]:
    """Return the median CPU seconds of a process that imports nothing, NumPy, and us."""
    rows = []
    for what in ("pass", "import numpy", "import distnadam", "from distnadam import DistNadam"):
        found = []
        for _ in range(7):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", what], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        rows.append({"process": what, "cpu_s": statistics.median(found)})
    return rows


class Trivial:
    """A policy network of 10^4 parameters whose gradient costs nothing."""

    def __init__(self) -> None:
        self._gradient = {"w": np.full(10**4, 0.01, np.float32)}

    def init(self, seed: int) -> dict[str, np.ndarray]:
        return {"w": np.zeros(10**4, np.float32)}

    def batch(self, step: int, rank: int, world_size: int) -> int:
        return step

    def loss_and_gradients(self, params: Any, batch: int) -> tuple[float, Any]:
        return 1.0, self._gradient

    def evaluate(self, params: Any) -> dict[str, float]:
        return {}


def loop_of_fit() -> dict[str, Any]:
    """Return the milliseconds of a round of `fit`, without its start and its end, and of its step
    alone, with two local workers.
    """
    made = {"num_workers": 2, "num_shards": 1, "backend": "local"}
    took = {}
    for steps in (100, FIT_STEPS, FIT_STEPS + 6000):  # the first is a warm-up
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            fit(Trivial(), steps=steps, verbose=0, checkpoint_dir=directory, **made)
            took[steps] = time.perf_counter() - began
    whole = (took[FIT_STEPS + 6000] - took[FIT_STEPS]) / 6000
    gradient = {"w": np.full(10**4, 0.01, np.float32)}
    with DistNadam(**made).build({"w": np.zeros(10**4, np.float32)}) as optimizer:
        workers = [optimizer.worker(rank) for rank in range(2)]

        def step() -> None:
            for ticket in [worker.push(gradient) for worker in workers]:
                ticket.result()
            for worker in workers:
                worker.pull()

        alone = timed({"step": step}, 1000)["step"]
    return {"fit_ms": whole * 1e3, "step_ms": alone * 1e3, "fit_over_step": whole / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=lambda text: int(float(text)), default=5 * 10**7)
    parser.add_argument("--only", help="one of the tables: step, many, settings, import, fit")
    parser.add_argument("--out", help="a file for the rows, as JSON")
    args = parser.parse_args()
    console = Console(width=110)
    sizes = {elements: count for elements, count in SIZES.items() if elements <= args.most}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "step": lambda: [
            row
            for size in sizes.items()
            for tensors in (1, 10)
            for row in steps_by_size(*size, tensors)
        ],
        "many": many_tensors,
        "settings": settings,
        "import": imports,
        "fit": lambda: [loop_of_fit()],
    }
    found = {}
    for name, measure in parts.items():
        if args.only not in (None, name):
            continue
        rows = found[name] = measure()
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
