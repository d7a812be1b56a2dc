"""The time from a SIGKILL to the next applied step, and the cost of standbys and bookkeeping.

Everything runs on a Ray of its own, on one node. A trainer steps as fast as it can and records the
time of each step; the figure is the gap in its records after a process is killed, from the kill on.
"""

import os
import signal
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from distnadam import DistNadam, Options, fit
from distnadam.errors import StaleEpoch
from distnadam.protocol.messages import Push
from distnadam.shard.ledger import Ledger
from distnadam.training.callbacks import Callback

PAUSE_S = 1.5


class Trainer:
    """A thread of this process that steps the only rank until `stop`, recording when."""

    def __init__(self, optimizer: DistNadam, elements: int) -> None:
        self._optimizer = optimizer
        self._stop = threading.Event()
        self._gradient = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _train(self) -> None:
        with self._optimizer.worker(0) as worker:
            while not self._stop.is_set():
                try:
                    worker.step({"w": self._gradient})
                except StaleEpoch:
                    worker.pull()
                self.times.append(time.perf_counter())


def shard_killed(replicas: int, elements: int, kills: int) -> list[float]:
    """Return the seconds from each kill of a shard to the next applied step."""
    found = []
    start = {"w": np.zeros(elements, np.float32)}
    with tempfile.TemporaryDirectory() as root:
        options = Options(checkpoint_dir=None if replicas else root)
        with DistNadam(
            num_shards=2, num_workers=1, replicas=replicas, backend="ray", options=options
        ).build(start) as optimizer:
            trainer = Trainer(optimizer, elements)
            try:
                for number in range(kills):
                    wait_for_standbys(optimizer, 2 * replicas)
                    time.sleep(PAUSE_S)
                    actors = optimizer.shards.backend.actors  # type: ignore[attr-defined]
                    pid = int(ray.get(actors[number % 2].about.remote())["pid"])
                    killed, before = time.perf_counter(), len(trainer.times)
                    os.kill(pid, signal.SIGKILL)
                    found.append(next_after(trainer, killed, before) - killed)
                    optimizer.round  # noqa: B018  # asks a shard, and so learns where they are now
            finally:
                trainer.stop()
    return found


def next_after(trainer: Trainer, killed: float, before: int) -> float:
    """Return when the step after the longest pause since the kill was applied."""
    deadline = killed + 30.0
    while time.perf_counter() < deadline:
        recorded = [killed, *trainer.times[before:]]
        gaps = [(later - earlier, later) for earlier, later in pairwise(recorded)]
        if gaps and time.perf_counter() > max(gaps)[1] + 1.0:
            return max(gaps)[1]
        time.sleep(0.01)
    raise RuntimeError("no step was applied in 30 s after a kill")


def wait_for_standbys(optimizer: DistNadam, count: int) -> None:
    """Wait until `count` standbys follow their shards."""
    shards = optimizer.shards
    while sum(d.replicated is not None for d in shards.describe_all()) < count:
        time.sleep(0.05)


class Vector:
    """A task whose ranks append their process id and the time of every gradient to a file."""

    name = "vector"

    def __init__(self, elements: int, notes: Path) -> None:
        self.elements = elements
        self.notes = notes

    def init(self, seed: int) -> Any:
        return {"w": np.zeros(self.elements, np.float32)}

    def batch(self, step: int, rank: int, world_size: int) -> int:
        with open(self.notes / str(rank), "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {time.time()}\n")
        return step

    def loss_and_gradients(self, params: Any, batch: int) -> tuple[float, Any]:
        return 0.0, {"w": np.ones(self.elements, np.float32)}

    def evaluate(self, params: Any) -> dict[str, float]:
        return {}


class Killer(Callback):
    """Kills rank 1 of a `fit` at certain steps, and reads when its next process computed."""

    def __init__(self, notes: Path, every: int, last: int) -> None:
        self.kills: list[tuple[int, float]] = []
        self._notes = notes
        self._every = every
        self._last = last

    def on_step(self, step: int, loss: float) -> None:
        if step % self._every == 0 and step <= self._last:
            pid = int((self._notes / "1").read_text().split("\n")[-2].split()[0])
            if pid not in dict(self.kills):  # several steps are reported at once
                self.kills.append((pid, time.time()))
                os.kill(pid, signal.SIGKILL)

    def seconds(self) -> list[float]:
        rows = [line.split() for line in (self._notes / "1").read_text().splitlines()]
        return [
            min(float(t) for p, t in rows if int(p) != pid and float(t) > killed) - killed
            for pid, killed in self.kills
        ]


def worker_killed(elements: int) -> list[float]:
    """Return the seconds from each kill of a worker to its successor's first gradient."""
    with tempfile.TemporaryDirectory() as root:
        notes = Path(root) / "notes"
        notes.mkdir()
        killer = Killer(notes, 100, 600)
        fit(
            Vector(elements, notes),
            steps=1000,
            backend="ray",
            checkpoint_dir=Path(root) / "run",
            verbose=False,
            callbacks=[killer],
        )
        return killer.seconds()


def seconds_per_step(replicas: int, elements: int, steps: int) -> float:
    """Return the median seconds of a step with one worker and two shards."""
    start = {"w": np.zeros(elements, np.float32)}
    with (
        DistNadam(num_shards=2, replicas=replicas, backend="ray").build(start) as optimizer,
        optimizer.worker(0) as worker,
    ):
        wait_for_standbys(optimizer, 2 * replicas)
        gradients = worker.gradients()
        gradients["w"][...] = 1.0
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            worker.step()
            times.append(time.perf_counter() - began)
        return statistics.median(times[steps // 5 :])


def ledger_seconds(ranks: int = 2, rounds: int = 20000) -> float:
    """Return the seconds of one round's bookkeeping on one shard: the ledger and the notes."""
    ledger, gradients = Ledger(), {"float32": np.zeros(4, np.float32)}
    began = time.perf_counter()
    for number in range(1, rounds + 1):
        for rank in range(ranks):
            ledger.counted(rank, 1, number)
            push = Push(epoch=1, rank=rank, incarnation=1, round=number, gradients=gradients)
            assert push.note.round == number
            ledger.count(rank, 1, number)
    return (time.perf_counter() - began) / rounds


def measure(elements: int, kills: int) -> list[dict[str, Any]]:
    """Return one row per figure."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    rows = []
    for name, seconds in (
        ("shard killed, replicas=1: to the next applied step", shard_killed(1, elements, kills)),
        (
            "shard killed, replicas=0 with a checkpoint: to the next applied step",
            shard_killed(0, elements, kills),
        ),
        ("worker killed under fit: to its successor's next gradient", worker_killed(elements)),
    ):
        rows.append(
            {
                "what": name,
                "median_s": statistics.median(seconds),
                "worst_s": max(seconds),
                "count": len(seconds),
            }
        )
    rows.append(
        {
            "what": "bookkeeping of one round / a step of 1e4, replicas=0",
            "ratio": ledger_seconds() / seconds_per_step(0, 10_000, 1000),
        }
    )
    for size, steps in ((10_000, 1000), (elements, 300)):
        rows.append(
            {
                "what": f"step with replicas=1 / replicas=0, {size} parameters",
                "ratio": ratio(size, steps),
            }
        )
    ray.shutdown()
    return rows


def ratio(elements: int, steps: int) -> float:
    """Return the ratio of a step with a standby to one without, both measured twice in turn."""
    with_standby, without = [], []
    for _ in range(2):
        without.append(seconds_per_step(0, elements, steps))
        with_standby.append(seconds_per_step(1, elements, steps))
    return statistics.median(with_standby) / statistics.median(without)


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(
        "what",
        "median",
        "worst",
        "ratio",
        title="deaths, by SIGKILL, 1e6 parameters, 2 shards, one node",
    )
    for row in rows:
        seconds = [f"{row[key]:.3f} s" if key in row else "" for key in ("median_s", "worst_s")]
        table.add_row(row["what"], *seconds, f"{row['ratio']:.3f}" if "ratio" in row else "")
    console.print(table)


if __name__ == "__main__":
    report(measure(1_000_000, 6), Console(width=110))
