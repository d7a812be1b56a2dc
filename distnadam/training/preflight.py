"""What a newcomer gets wrong, found before the first step: by doing what a run does first.

The task is initialised, copied, asked for a batch and its gradients twice; the directory and the
disk are looked at; then shards and workers are started where they would run, and ended again. No
step is applied and nothing is written.
"""

import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.backends.base import WorkerGroup
from distnadam.backends.factory import resolve
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.config import Options, Settings
from distnadam.copies import copied
from distnadam.errors import CheckpointError, ClusterError, DistNadamError, StructureError
from distnadam.optimizer import DistNadam
from distnadam.places import place
from distnadam.tensors.layout import Layout
from distnadam.tensors.leaves import as_numpy
from distnadam.training.rank_loop import make_rank_loop, samples_in
from distnadam.training.resuming import Request, find_checkpoint
from distnadam.training.steps import in_words
from distnadam.training.task import Task, task_name
from distnadam.training.task_code import TaskCode
from distnadam.training.task_state import TaskState

_START_S = 60.0
"""Seconds in which workers begin, where `Options.start_timeout_s` does not say."""


@dataclass
class Preflight:
    """What was found: the plan as rows of two words, and a sentence for each problem."""

    plan: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Take an error of the body as a problem."""
        try:
            yield
        except DistNadamError as error:
            self.problems.append(str(error))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}"
            self.problems.append(f"{what}: raised {type(error).__name__}: {error} ({where})")


def preflight(
    task: Task,
    settings: Settings,
    *,
    steps: int,
    seed: int,
    checkpoint_dir: str | Path | None,
    keep: int,
    resume: str,
    is_given: bool,
) -> Preflight:
    """Try a run without a step, and return its plan and what is wrong.

    Args:
        task: as `fit` takes it.
        settings: of the optimizer, with its topology.
        steps, seed, checkpoint_dir, keep, resume: as `fit` takes them.
        is_given: whether hyper-parameters are asked for, see `Request`.
    """
    found = Preflight()
    label, topology = task_name(task), settings.topology
    params: Any = None
    layout: Layout | None = None
    with found.trying("init"):
        params = task.init(seed)
        layout = Layout.of(params)
    if layout is None:
        return found
    size = layout.array_bytes
    found.plan += [
        ("task", label),
        ("parameters", f"{layout.num_elements:,} in {len(layout.tensors)} tensors, {_size(size)}"),
        ("steps", f"{steps:,}"),
    ]
    with found.trying("the task"):
        _try_task(found, task, params, layout, topology.num_workers)
    checkpoint_bytes = size * len(settings.config.state_arrays)
    request = Request(
        label=label,
        seed=seed,
        layout=layout,
        settings=settings,
        state=TaskState(task),
        is_given=is_given,
        resume=resume,
    )
    with found.trying("checkpoint_dir"):
        _try_directory(found, request, checkpoint_dir, keep * checkpoint_bytes)
    backend = resolve(topology.backend, several=topology.several)
    where = "this process" if backend == "local" else os.environ.get("RAY_ADDRESS") or "a new Ray"
    shard_bytes = size * (1 + len(settings.config.state_arrays)) / topology.num_shards
    found.plan += [
        ("backend", f"{backend}: {where}"),
        ("shards", f"{topology.num_shards} of {_size(shard_bytes)}"),
        ("standbys", str(topology.num_shards * topology.replicas)),
        ("workers", str(topology.num_workers)),
        ("checkpoint", f"{_size(checkpoint_bytes)}, the last {keep} are kept"),
    ]
    if not found.problems:
        with found.trying("starting"):
            _try_start(found, task, settings, params)
    return found


def _try_task(found: Preflight, task: Task, params: Any, layout: Layout, world_size: int) -> None:
    first, second = (copied(task, f"task {task_name(task)!r}") for _ in range(2))
    batches = [each.batch(0, 0, world_size) for each in (first, first, second)]
    if not all(_same(batches[0], other) for other in batches[1:]):
        found.problems.append(
            "batch(0, 0, world_size) gives another batch when it is asked again: a rank that is "
            "started again would train on other data; draw it from "
            "numpy.random.default_rng([seed, step, rank, world_size])"
        )
        return
    results = [each.loss_and_gradients(params, batches[0]) for each in (first, second)]
    (loss, gradients), (other_loss, other_gradients) = results
    layout.flat(gradients, what="the gradients")
    if not np.isfinite(float(loss)):
        found.problems.append(f"the loss of the first batch is {float(loss)}: look at the data")
    elif float(loss) != float(other_loss) or not _same(gradients, other_gradients):
        found.problems.append(
            "loss_and_gradients gives other gradients for the same parameters and batch: a run "
            "that recovers would end with other bits; seed what it draws (dropout) by the batch"
        )
    if samples := samples_in(batches[0]):
        found.plan.append(("batch", f"{samples} samples a rank, {samples * world_size} a step"))


def _same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits; what is neither tree nor array is compared by ==."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "__array__"):
        try:
            return as_numpy(a).tobytes() == as_numpy(b).tobytes()
        except (StructureError, AttributeError):
            return False
    try:
        compares: Any = type(a).__eq__
        return bool(a == b) or compares is object.__eq__  # which says nothing of its content
    except Exception:
        return True


def _try_directory(
    found: Preflight, request: Request, checkpoint_dir: str | Path | None, needed: int
) -> None:
    directory = open_directory(checkpoint_dir or place("runs", "the run's directory"))
    if isinstance(directory, LocalDirectory):
        check_disk(directory.path, needed)
    if checkpoint_dir is None:
        found.plan.append(("directory", f"runs/{request.label}-TIME, a new one"))
        return
    found.plan.append(("directory", str(directory)))
    checkpoint = find_checkpoint(directory, request, lambda _: None)
    found.plan.append(("begins at", "step 0" if checkpoint is None else f"{checkpoint[0]}"))


def check_disk(path: Path, needed: int) -> None:
    """Raise CheckpointError unless a directory can be made, written, and has so many bytes free."""
    there = path
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "you may not write there" if there.is_dir() else "it is no directory"
        raise CheckpointError(
            f"{there}: cannot be made or written: {why}; give another checkpoint_dir"
        )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{there}: {_size(free)} are free, and the checkpoints that are kept take "
            f"{_size(needed)}: free some, keep fewer, or give another checkpoint_dir"
        )


def _try_start(found: Preflight, task: Task, settings: Settings, params: Any) -> None:
    topology = settings.topology
    group: WorkerGroup | None = None
    with DistNadam.of(settings) as optimizer:
        optimizer.build(params)
        make = partial(
            make_rank_loop,
            code=TaskCode(task),
            optimizer=optimizer,
            world_size=topology.num_workers,
            first=0,
            accumulate=1,
        )
        try:
            group = optimizer.team(make, task)
            for rank in range(topology.num_workers):
                group.call(rank, "run", 0)  # no step: it only begins
            _await_workers(group, topology.num_workers, settings.options)
            hosts = sorted({*optimizer.shards.backend.hosts(), *group.hosts().values()})
            found.plan.append(("hosts", ", ".join(hosts)))
        finally:
            optimizer.close()
            if group is not None:
                group.close()


def _await_workers(group: WorkerGroup, size: int, options: Options) -> None:
    """Wait until all workers have begun; raise what one of them raised, or ClusterError."""
    patience_s = options.start_timeout_s or _START_S
    deadline, waited_for = time.monotonic() + patience_s, set(range(size))
    while waited_for and time.monotonic() < deadline:
        for rank, result in group.results(0.2):
            waited_for.discard(rank)
            if isinstance(result, Exception):
                raise result
    if waited_for:
        asked = f"CPU {options.worker_cpus:g}"
        if options.worker_label_selector:
            asked += f" and the labels {dict(options.worker_label_selector)}"
        raise ClusterError(
            f"workers {in_words(sorted(waited_for))} have not begun in {patience_s:g} s: each asks "
            f"Ray for {asked}; ask for less, have fewer workers, or add nodes (`ray status` says "
            "what is free)"
        )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
