"""What a newcomer gets wrong, found before the first step: by doing what a run does first.

The task is initialised, copied, asked for a batch and its gradients twice; the directory and the
disk are looked at; then shards and workers are started where they would run, and ended again. No
step is applied and nothing is written.
"""

import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distnadam.backends.base import WorkerGroup
from distnadam.backends.factory import resolve
from distnadam.checkpoint import store
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.config import Options, Settings
from distnadam.copies import copied
from distnadam.errors import CheckpointError, ClusterError, DistNadamError
from distnadam.optimizer import DistNadam
from distnadam.places import place
from distnadam.planning.requests import asked_by_workers
from distnadam.tensors.layout import Layout
from distnadam.training.rank_loop import samples_in, start_ranks
from distnadam.training.resuming import Request, find_checkpoint
from distnadam.training.run_plan import RunPlan
from distnadam.training.steps import in_words
from distnadam.training.task import Task, task_name
from distnadam.training.task_checks import check_methods, is_deterministic, repeated
from distnadam.training.task_code import TaskCode
from distnadam.training.task_errors import task_errors
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
    plan: RunPlan,
    *,
    seed: int,
    checkpoint_dir: str | Path | None,
    resume: str,
    is_given: bool,
    say: Callable[[str], object] = lambda text: None,
) -> Preflight:
    """Try a run without a step, and return its plan and what is wrong.

    Args:
        task: as `fit` takes it.
        settings: of the optimizer, with its topology.
        plan: steps, and what is saved.
        seed, checkpoint_dir, resume: as `fit` takes them.
        is_given: whether hyper-parameters are asked for, see `Request`.
        say: gets what begins that takes seconds.
    """
    found = Preflight()
    label, topology = task_name(task), settings.topology
    params: Any = None
    layout: Layout | None = None
    with found.trying("init"):
        check_methods(task, label, plan.accumulate, scaled=settings.config.loss_scale is not None)
        with task_errors("init"):
            params = task.init(seed)
        layout = Layout.of(params)
    if layout is None:
        return found
    size = layout.array_bytes
    found.plan += [
        ("task", label),
        ("parameters", f"{layout.num_elements:,} in {len(layout.tensors)} tensors, {_size(size)}"),
        ("steps", f"{plan.steps:,}"),
    ]
    with found.trying("the task"):
        _try_task(found, task, params, layout, settings, plan)
    checkpoint_bytes = size * len(settings.config.state_arrays)
    request = Request(
        label=label,
        seed=seed,
        layout=layout,
        settings=settings,
        state=TaskState(task),
        is_given=is_given,
        resume=resume,
        accumulate=plan.accumulate,
    )
    with found.trying("checkpoint_dir"):
        _try_directory(found, request, checkpoint_dir, plan, checkpoint_bytes)
    backend = resolve(topology.backend, several=topology.several)
    where = "this process" if backend == "local" else os.environ.get("RAY_ADDRESS") or "a new Ray"
    shard_bytes = size * (1 + len(settings.config.state_arrays)) / topology.num_shards
    found.plan += [
        ("backend", f"{backend}: {where}"),
        ("shards", f"{topology.num_shards} of {_size(shard_bytes)}"),
        ("standbys", str(topology.num_shards * topology.replicas)),
        ("workers", str(topology.num_workers)),
        ("checkpoint", f"{_size(checkpoint_bytes)}, the last {plan.keep.last} are kept"),
    ]
    if not found.problems:
        ray = "Ray, " if where == "a new Ray" else ""
        say(f"starting {ray}{topology.num_shards} shards and {topology.num_workers} workers to try")
        with found.trying("starting"):
            _try_start(found, task, settings, params)
    return found


def _try_task(
    found: Preflight, task: Task, params: Any, layout: Layout, settings: Settings, plan: RunPlan
) -> None:
    mine, world_size = copied(task, f"task {task_name(task)!r}"), settings.topology.num_workers
    which = {"micro_batch": 0} if plan.accumulate > 1 else {}
    scale = {"loss_scale": 1.0} if settings.config.loss_scale is not None else {}
    batch_of: Callable[..., Any] = partial(mine.batch, 0, 0, world_size, **which)
    compute: Callable[..., Any] = mine.loss_and_gradients
    with task_errors("step 0"):
        if is_deterministic(task):
            batch, loss, gradients = repeated(
                mine, "step 0", batch_of, lambda batch: compute(params, batch, **scale)
            )
        else:
            batch = batch_of()
            loss, gradients = compute(params, batch, **scale)
    layout.flat(gradients, what="the gradients")
    if not np.isfinite(float(loss)):
        found.problems.append(f"the loss of the first batch is {float(loss)}: look at the data")
    if samples := samples_in(batch) * plan.accumulate:
        found.plan.append(("batch", f"{samples} samples a rank, {samples * world_size} a step"))


def _try_directory(
    found: Preflight,
    request: Request,
    checkpoint_dir: str | Path | None,
    plan: RunPlan,
    checkpoint_bytes: int,
) -> None:
    directory = open_directory(checkpoint_dir or place("runs", "the run's directory"))
    if isinstance(directory, LocalDirectory):
        check_disk(directory, plan, checkpoint_bytes)
    if checkpoint_dir is None:
        found.plan.append(("directory", f"runs/{request.label}-TIME, a new one"))
        return
    found.plan.append(("directory", str(directory)))
    checkpoint = find_checkpoint(directory, request, lambda _: None)
    found.plan.append(("begins at", "step 0" if checkpoint is None else f"{checkpoint[0]}"))


def check_disk(directory: LocalDirectory, plan: RunPlan, checkpoint_bytes: int) -> None:
    """Raise CheckpointError unless a directory can be made, written, and has room for what a run
    will save there beside what it has saved.
    """
    there = directory.path
    while not os.path.exists(there):
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "you may not write there" if there.is_dir() else "it is no directory"
        raise CheckpointError(
            f"{there}: cannot be made or written: {why}; give another checkpoint_dir"
        )
    saved = len(store.step_directories(directory)) if there == directory.path else 0
    more = max(1, plan.most_checkpoints - saved)
    free, needed = shutil.disk_usage(there).free, more * checkpoint_bytes
    if free < needed:
        what = "the checkpoint" if more == 1 else f"{more} checkpoints, which are kept at a time,"
        raise CheckpointError(
            f"{there}: {_size(free)} are free, and {what} will take {_size(needed)}: free some, "
            "keep fewer, or give another checkpoint_dir"
        )


def _try_start(found: Preflight, task: Task, settings: Settings, params: Any) -> None:
    num_workers = settings.topology.num_workers
    group: WorkerGroup | None = None
    with DistNadam.of(settings) as optimizer:
        optimizer.build(params)
        try:
            group = start_ranks(
                optimizer, task, TaskCode(task), world_size=num_workers, first=0, accumulate=1
            )
            for rank in range(num_workers):
                group.call(rank, "run", 0)  # no step: it only begins
            _await_workers(group, num_workers, settings.options)
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
        raise ClusterError(
            f"workers {in_words(sorted(waited_for))} have not begun in {patience_s:g} s: each asks "
            f"Ray for {asked_by_workers(options)}; ask for less, have fewer workers, or add nodes "
            "(`ray status` says what is free)"
        )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
