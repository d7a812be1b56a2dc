"""What watching costs: a run of `fit` with all that it shows and records, beside the same without
it, and beside a loop of one's own.

    .venv-bench/bin/python -m benchmarks.watching

A run that is watched draws its panel on a terminal (a pseudo-terminal of 120 columns), writes
metrics.csv and events.jsonl, keeps its history, looks at its shards, and calls three callbacks;
one that is not does none of this, but its ranks take the times of phases, as they always do, which
the loop of one's own does not. All step a perceptron of 10^5 parameters in this process, in turns;
what counts is the ratio of turns of one round. The start and the end of a run are left out.

The first table says what the parts of watching take of a run's own CPU time, each by the time of
the thread that it runs in. It is the steadier one, but lacks the times that ranks take and what
watching displaces from caches; and where other work starves a run, too much is seen of the panel
and of looks, which go by the clock, and of reports, since bursts have fewer steps.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pty
import statistics
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from typing_extensions import override

from distnadam import DistNadam, Options, fit
from distnadam.callbacks import CSVLogger, EarlyStopping, ReduceLROnPlateau
from distnadam.training import run
from distnadam.training.callbacks import Callback
from distnadam.training.steps import StepRecord

HIDDEN = 126
"""Units: with 784 inputs and 10 classes these are 100,186 parameters."""
COLUMNS, LINES = 120, 40
FIRST_STEPS = 0.2
"""Of a turn: the part that does not count, in which bursts grow to their length."""
RESAMPLES = 10_000

Spent = tuple[float, float]
"""Wall and CPU seconds of a step."""


class Perceptron:
    """Two layers and a softmax, forward and backward in NumPy, on one fixed batch."""

    def __init__(self, batch: int) -> None:
        rng = np.random.default_rng(1)
        self._images = rng.standard_normal((batch, 784), dtype=np.float32)
        self._labels = rng.integers(0, 10, batch)

    def init(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "w1": 0.05 * rng.standard_normal((784, HIDDEN), dtype=np.float32),
            "b1": np.zeros(HIDDEN, np.float32),
            "w2": 0.1 * rng.standard_normal((HIDDEN, 10), dtype=np.float32),
            "b2": np.zeros(10, np.float32),
        }

    def batch(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        return self._images, self._labels

    def loss_and_gradients(
        self, params: dict[str, np.ndarray], batch: tuple[np.ndarray, np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray]]:
        images, labels = batch
        hidden = np.maximum(images @ params["w1"] + params["b1"], 0)
        scores = hidden @ params["w2"] + params["b2"]
        scores -= scores.max(1, keepdims=True)
        exponents = np.exp(scores)
        shares = exponents / exponents.sum(1, keepdims=True)
        rows = np.arange(len(labels))
        loss = float(-np.log(shares[rows, labels] + 1e-9).mean())
        shares[rows, labels] -= 1
        shares /= len(labels)
        back = (shares @ params["w2"].T) * (hidden > 0)
        gradients = {"w1": images.T @ back, "b1": back.sum(0)}
        return loss, {**gradients, "w2": hidden.T @ shares, "b2": shares.sum(0)}

    def evaluate(self, params: dict[str, np.ndarray]) -> dict[str, float]:
        return {}


class Clock:
    """Measures the steps of a turn, all but the first ones.

    Args:
        steps: of a turn.
    """

    def __init__(self, steps: int) -> None:
        self._from = int(FIRST_STEPS * steps)
        self._seen: list[tuple[int, float, float]] = []

    def at(self, step: int) -> None:
        """Note the time after a step."""
        if step >= self._from:
            self._seen.append((step, time.perf_counter(), time.process_time()))

    @property
    def spent(self) -> Spent:
        """The seconds of a step."""
        (first, *began), (last, *ended) = self._seen[0], self._seen[-1]
        wall, cpu = ((b - a) / (last - first) for a, b in zip(began, ended, strict=True))
        return wall, cpu


class Timer(Callback):
    """Tells a clock of each burst, last of all callbacks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @override
    def on_records(self, records: Sequence[StepRecord]) -> None:
        self._clock.at(records[-1].step)


def optimizer() -> DistNadam:
    return DistNadam(lr=1e-4, backend="local", options=Options(threads=1))


def bare(task: Perceptron, steps: int) -> Spent:
    """Step in a loop of one's own."""
    clock = Clock(steps)
    with optimizer().build(task.init(0)) as made, made.worker(0) as worker:
        params = worker.pull()
        for step in range(steps):
            _, gradients = task.loss_and_gradients(params, task.batch(step, 0, 1))
            params = worker.step(gradients)
            if step % 100 == 99:
                clock.at(step + 1)
    return clock.spent


def by_fit(task: Perceptron, steps: int, *, callbacks: Sequence[Callback], verbose: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        fit(
            task,
            steps=steps,
            num_workers=1,
            num_shards=1,
            optimizer=optimizer(),
            checkpoint_dir=f"{directory}/run",
            callbacks=callbacks,
            verbose=verbose,
        )


class Parts:
    """Adds up the CPU seconds of the parts of watching, in whichever thread each runs."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reports", "looks", "panel"), 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, and whose time is added."""

        def call(*args: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **named)
            finally:
                self.seconds[part] += time.thread_time() - began

        return call


def watched(task: Perceptron, steps: int) -> Spent:
    """Step by `fit`, with the panel and callbacks."""
    clock = Clock(steps)
    with tempfile.TemporaryDirectory() as directory:
        logger = CSVLogger(f"{directory}/epochs.csv")
        callbacks = [logger, EarlyStopping("loss"), ReduceLROnPlateau("loss"), Timer(clock)]
        by_fit(task, steps, callbacks=callbacks, verbose=1)
    return clock.spent


def shares(task: Perceptron, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each part of watching: its median share of the CPU time of a run."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        parts = Parts()
        with (
            patch.object(run, "report_steps", parts.timed("reports", run.report_steps)),
            patch.object(run.Watch, "look", parts.timed("looks", run.Watch.look)),
            patch.object(Live, "refresh", parts.timed("panel", Live.refresh)),
        ):
            began = time.process_time()
            watched(task, steps)
            whole = time.process_time() - began
        for part, seconds in parts.seconds.items():
            found.setdefault(part, []).append(100 * seconds / whole)
        found.setdefault("all", []).append(100 * sum(parts.seconds.values()) / whole)
    rows = []
    for part, each in found.items():
        share, low, high = interval(each)
        rows.append({"part": part, "% of the CPU time": share, "from": low, "to": high})
    return rows


class Blind(Callback):
    """In place of what records a run, and of what looks at its shards: it does nothing."""

    apply_s = 0.0

    def __init__(self, *_: object) -> None: ...

    def look(self, step: int) -> None: ...


def unwatched(task: Perceptron, steps: int) -> Spent:
    """Step by `fit` without anything that shows or records."""
    clock = Clock(steps)

    def tell_clock(_: object, history: object, seen: object, steps: range, *__: object) -> None:
        clock.at(steps.stop)

    recorders = dict.fromkeys(("MetricsFile", "Recorder", "RunRecord"), Blind)
    with (
        patch.multiple("distnadam.training.fit", **recorders),
        patch.multiple("distnadam.training.run", report_steps=tell_clock, Watch=Blind),
    ):
        by_fit(task, steps, callbacks=(), verbose=0)
    return clock.spent


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Have standard error be a terminal, whose other end is read and forgotten."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    shown = [0]

    def drain() -> None:
        with contextlib.suppress(OSError):  # it is closed
            while text := os.read(ours, 1 << 16):
                shown[0] += len(text)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    before, sys.stderr = sys.stderr, os.fdopen(theirs, "w", buffering=1)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        reader.join()
        os.close(ours)
        assert shown[0], "no panel was drawn"


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of ratios, and what it is between with 95%, by the bootstrap."""
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return statistics.median(ratios), float(low), float(high)


SIDES: dict[str, Callable[[Perceptron, int], Spent]] = {
    "loop": bare,
    "fit": unwatched,
    "fit again": unwatched,  # shows the noise
    "fit, watched": watched,
}
COMPARED = (("fit again", "fit"), ("fit, watched", "fit"), ("fit, watched", "loop"))


def measure(batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each two sides that are compared, of wall and of CPU time: the median
    microseconds of a step, and of their ratio, with what this is between.
    """
    task = Perceptron(batch)
    found: dict[str, list[Spent]] = {name: [] for name in SIDES}
    with terminal():
        for turn in range(-1, rounds):  # one to warm up
            for name in SIDES if turn % 2 else reversed(SIDES):
                spent = SIDES[name](task, steps)
                if turn >= 0:
                    found[name].append(spent)
    rows = []
    for kind, column in enumerate(("wall", "cpu")):
        for this, other in COMPARED:
            ours, theirs = ([spent[kind] for spent in found[name]] for name in (this, other))
            ratio, low, high = interval([a / b for a, b in zip(ours, theirs, strict=True)])
            rows.append(
                {
                    "time": column,
                    "steps of": this,
                    "over": other,
                    "us": 1e6 * statistics.median(ours),
                    "us of these": 1e6 * statistics.median(theirs),
                    "ratio": ratio,
                    "from": low,
                    "to": high,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128, help="samples, which set a step's time")
    parser.add_argument("--steps", type=int, default=1000, help="of a turn")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each side")
    parser.add_argument("--parts", action="store_true", help="the parts of a run's time alone")
    parser.add_argument("--out", help="a file for the rows, as JSON")
    args = parser.parse_args()
    with terminal():
        parts = shares(Perceptron(args.batch), 5 * args.steps, max(1, args.rounds // 5))
    found = {"parts": parts}
    if not args.parts:
        found["steps"] = measure(args.batch, args.steps, args.rounds)
    for rows in found.values():
        table = Table(*rows[0], title="10^5 parameters, one worker, in this process")
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(width=110).print(table)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
