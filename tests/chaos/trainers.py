"""Trainers in processes of their own, made again when they die, and the board on which they write
when each step began and ended.

The board is a file that all map, so that nobody has to ask a process that died.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optree
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from distnadam import DistNadam, Worker
from distnadam.backends.base import WorkerChannel
from distnadam.backends.ray.processes import process_start_time
from distnadam.errors import (
    LatePush,
    Rewound,
    StaleEpoch,
    StepTimeout,
    SupersededWorker,
    WorkerLost,
)
from tests.models import gradients, lacking, leaves, params

Result = TypeVar("Result")
WORKERS = 2
PATIENCE_S = 120.0
"""Seconds without a step after which a run counts as hung."""


def gradients_at(tree: Any, step: int, rank: int, *, clocks: str) -> Any:
    """The gradients of one rank at one step and these parameters, so that stale or torn parameters
    show in the bits; without some where tensors have clocks.
    """
    flat = iter(
        [
            g + np.asarray(p) * np.asarray(0.0625, np.asarray(p).dtype)
            for g, p in zip(_both(step, rank), leaves(tree), strict=True)
        ]
    )
    whole = _like(params(), flat)
    return lacking(whole, step, rank) if clocks == "tensor" else whole


def contribute(worker: Worker, tree: Any, step: int, config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a worker's push or step of these parameters.

    Where there is a loss scale, gradients are of a scaled loss, and every fourth step is the mean
    of two micro-batches, which the worker has then.
    """
    whole = gradients_at(tree, step, worker.rank, clocks=config["clocks"])
    said = said_at(step, worker.rank)
    if config.get("loss_scale") is None:
        return {"gradients": whole, **said}
    with np.errstate(over="ignore"):  # of half precision, now and then: a vote
        scaled = optree.tree_map(lambda g: g * np.asarray(worker.loss_scale, g.dtype), whole)
    if step % 4 != 1:
        return {"gradients": scaled, **said}
    worker.discard()
    for _ in range(2):
        worker.accumulate(scaled)
    return said


def said_at(step: int, rank: int) -> dict[str, Any]:
    """What one rank says of one step beside its gradients: rates of it alone, now and then a vote
    to skip it.
    """
    rates = {"lr": 0.001 * (1 + step % 4), "betas": (0.85 + 0.01 * (step % 5), 0.99)}
    return {**(rates if step % 3 else {}), "found_inf": step % 11 == 7 and rank == 1}


def _both(step: int, rank: int) -> list[Any]:
    return leaves(gradients(step, rank))


def _like(tree: Any, flat: Iterator[Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _like(tree[key], flat) for key in sorted(tree)}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_like(child, flat) for child in tree)
    return next(flat)


def despite_rewinds(work: Callable[[], Result]) -> Result:
    """Do what an optimizer's handle refuses once after the shards went back."""
    while True:
        try:
            return work()
        except Rewound:
            continue


class Progress:
    """By rank: the last round decided, when its step began and ended (monotonic), rounds replayed
    so far.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).exists():
            np.zeros((WORKERS, 4)).tofile(path)
        self._rows = np.memmap(path, np.float64, "r+", shape=(WORKERS, 4))

    def stand(self, rank: int, decided: int) -> None:
        """Take where a rank stands; what was decided before already is replayed."""
        row = self._rows[rank]
        row[3] += max(0.0, row[0] - decided)
        row[0] = decided

    def step(self, rank: int, decided: int, began: float) -> None:
        """Take that a step ended."""
        self._rows[rank, :3] = decided, began, time.monotonic()

    def stepped_since(self, moment: float) -> float | None:
        """Return when the first step that began after a moment had ended, None before."""
        ends = [float(row[2]) for row in self._rows if row[1] > moment]
        return min(ends) if ends else None

    @property
    def round(self) -> int:
        """The newest round that anyone has seen decided."""
        return int(self._rows[:, 0].max())

    @property
    def replayed(self) -> int:
        """Rounds replayed so far."""
        return int(self._rows[:, 3].max())


class Trainer:
    """One rank in a process of its own, training until it is given its last round."""

    def __init__(self, optimizer: DistNadam, rank: int, board: str) -> None:
        self._rank, self._board, self._rng = rank, Progress(board), np.random.default_rng()
        self._end = 2**62
        self._doom: tuple[tuple[int, ...], int] | None = None
        self._config = optimizer.get_config()
        self._worker = optimizer.worker(rank)

    def about(self) -> tuple[int, str]:
        """Return this process."""
        return os.getpid(), process_start_time(os.getpid())

    def finish(self, end: int) -> None:
        """End once so many rounds are decided."""
        self._end = end

    def doom(self, shards: tuple[int, ...], post: int) -> None:
        """Die once a post of the coming step, the first or the second, has gone to these shards
        only.
        """
        self._doom = shards, post

    def run(self) -> int:
        """Train, from wherever the shards stand; return the round at the end."""
        while True:
            try:
                tree = self._worker.pull()
                while (step := self._worker.round) < self._end:
                    self._board.stand(self._rank, step)
                    began = time.monotonic()
                    given = contribute(self._worker, tree, step, self._config)
                    self._obey_doom()
                    tree = self._worker.step(**given)
                    self._board.step(self._rank, self._worker.round, began)
                    time.sleep(self._rng.uniform(0, 0.01))
                return step
            except (StaleEpoch, LatePush, StepTimeout, WorkerLost):
                continue

    def _obey_doom(self) -> None:
        if self._doom is None:
            return
        (shards, fatal), link = self._doom, self._worker.session.channel
        post, count = link.post, 0

        def post_some(messages: Any) -> Any:
            nonlocal count
            count += 1
            if count < fatal:
                return post(messages)
            post({shard: message for shard, message in messages.items() if shard in shards})
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        link.post = post_some  # type: ignore[method-assign]
        link.post_push = partial(WorkerChannel.post_push, link)  # by `post`, shard by shard


_trainer = ray.remote(Trainer).options(num_cpus=0, max_concurrency=3, max_restarts=0)


@dataclass
class Process:
    """A process that can be struck."""

    pid: int
    born: str

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.alive:
            os.kill(self.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return process_start_time(self.pid) == self.born


class Crowd:
    """All trainers of an optimizer; a thread replaces those whose process died."""

    def __init__(self, optimizer: DistNadam, board: str) -> None:
        self._optimizer, self._board = optimizer, board
        self._actors: dict[int, Any] = {}
        self._runs: dict[int, Any] = {}
        self._about: dict[int, Any] = {}
        self._end: int | None = None
        self._away: set[int] = set()
        self._lock = threading.RLock()
        self.failures: list[BaseException] = []
        self.done: dict[int, int] = {}
        for rank in range(WORKERS):
            self.replace(rank)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tend, daemon=True)
        self._thread.start()

    def replace(self, rank: int) -> Any:
        """Replace a rank's trainer; return the run of the one before, which is left alone."""
        with self._lock:
            old = self._runs.get(rank)
            self._away.discard(rank)
            actor = self._actors[rank] = _trainer.remote(self._optimizer, rank, self._board)
            self._about[rank] = actor.about.remote()
            if self._end is not None:
                actor.finish.remote(self._end)
            self._runs[rank] = actor.run.remote()
            return old

    def keep_away(self, rank: int) -> Process:
        """Return a rank's present process, in whose place no other is made before `replace`."""
        victim = self.process(rank)
        with self._lock:
            self._away.add(rank)
        return victim

    def process(self, rank: int) -> Process:
        """Return a rank's present process, once it runs."""
        while True:
            try:
                return Process(*ray.get(self._about[rank]))
            except RayActorError:
                time.sleep(0.01)  # the tending thread makes another

    def actor(self, rank: int) -> Any:
        """Return a rank's present trainer."""
        return self._actors[rank]

    def finish(self, end: int) -> None:
        """Have all end at a round, and wait for it."""
        with self._lock:
            self._end = end
            for actor in self._actors.values():
                actor.finish.remote(end)
        deadline = time.monotonic() + PATIENCE_S
        while len(self.done) < WORKERS and not self.failures:
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"hung: ranks {sorted(self.done)} of {WORKERS} reached round {end}"
                )
            time.sleep(0.01)
        if self.failures:
            raise self.failures[0]

    def close(self) -> None:
        """End every trainer."""
        self._stop.set()
        self._thread.join()
        for actor in self._actors.values():
            ray.kill(actor)

    def _tend(self) -> None:
        while not self._stop.wait(0.01):
            for rank in range(WORKERS):
                with self._lock:
                    if rank not in self.done and rank not in self._away:
                        self._attend(rank)

    def _attend(self, rank: int) -> None:
        if ray.wait([self._about[rank]], timeout=0)[0]:
            try:
                alive = Process(*ray.get(self._about[rank])).alive
            except RayActorError:
                alive = False
            if not alive:
                self.replace(rank)
                return
        if not ray.wait([self._runs[rank]], timeout=0)[0]:
            return
        try:
            reached = ray.get(self._runs[rank])
        except RayActorError:
            self.replace(rank)
        except RayTaskError as error:
            self.failures.append(error)
            self.done[rank] = -1
        else:
            if self._end is not None and reached >= self._end:
                self.done[rank] = reached


def superseded(run: Any, timeout_s: float) -> bool:
    """Whether the run of a replaced trainer ends by SupersededWorker, or with its process."""
    try:
        ray.get(run, timeout=timeout_s)
    except RayTaskError as error:
        if not isinstance(error.cause, SupersededWorker):
            print(f"it got {error.cause!r}")
        return isinstance(error.cause, SupersededWorker)
    except RayActorError:
        return True
    except GetTimeoutError:
        return False
    return False
