"""`fit`: train a task from its first step, or from its newest checkpoint, to its last. Only the
order of things is here.

Workers run segments of rounds that end together, so that between two segments nothing is pending:
there the driver saves, evaluates, shows progress and listens to Ctrl-C. Workers that die are
started anew (`ranks`), shards are replaced by the optimizer's supervisor; where that is gone too,
the whole run begins anew from its newest checkpoint.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from distnadam.backends.factory import BackendName
from distnadam.checkpoint.run_lock import make_run_lock
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.config import check_count
from distnadam.errors import ConfigError
from distnadam.optimizer import DistNadam
from distnadam.training.callbacks import Callback, MetricsFile, ProgressDisplay, console
from distnadam.training.checkpoint_manager import Plan, RetentionPolicy
from distnadam.training.history import History, Recorder
from distnadam.training.run import _Run
from distnadam.training.task import Task, run_directory, task_name


def fit(
    task: Task,
    *,
    steps: int,
    num_workers: int = 2,
    num_shards: int = 2,
    replicas: int = 0,
    optimizer: DistNadam | None = None,
    backend: BackendName = "auto",
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    save_every: int | None = None,
    keep: int = 3,
    keep_every: int | None = None,
    keep_every_s: float | None = None,
    resume: Literal["auto", "must", "never"] = "auto",
    evaluate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    verbose: bool | Literal["auto"] = "auto",
) -> History:
    """Train a task with data-parallel workers and return what happened.

    Args:
        task: see `Task`.
        steps: steps in all, those before a resume included.
        num_workers: ranks, each a Ray actor, or a thread where local.
        num_shards: shards of the optimizer.
        replicas: standbys per shard, 0 or 1.
        optimizer: a `DistNadam` that is not built, for its hyper-parameters and options; None means
            the defaults.
        backend: as `DistNadam` has it.
        seed: given to `Task.init`.
        checkpoint_dir: where checkpoints, metrics.csv and loss.png go; None means
            ``runs/<task>-<time>/``. Where it is an fsspec URL, the checkpoints go there and the
            others to that place.
        save_every: steps between checkpoints, written behind the training; one is written at the
            end in any case.
        keep: the last checkpoints, so many, are kept; beside them
        keep_every: those of steps that are multiples of this, and `keep_every_s`: one in each so
            many seconds.
        resume: "auto" goes on from the newest valid checkpoint in `checkpoint_dir` where there is
            one, "must" insists on one, "never" insists on none.
        evaluate_every: steps between evaluations; one comes at the end in any case.
        callbacks: told what happens.
        verbose: show progress on standard error; "auto" as True.

    Raises:
        TrainingError: the task's code raised, or a worker's process died, and three recoveries in a
            row of one rank, or of the run, brought no new step; the message names the rank and the
            step.
        CheckpointBusy: another run writes `checkpoint_dir`.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written; a second Ctrl-C raises at once.
    """
    for name, value in (
        ("steps", steps),
        ("keep", keep),
        ("num_workers", num_workers),
        ("num_shards", num_shards),
    ):
        check_count(name, value)
    for name, every in (
        ("save_every", save_every),
        ("evaluate_every", evaluate_every),
        ("keep_every", keep_every),
    ):
        if every is not None:
            check_count(name, every)
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f'resume must be "auto", "must" or "never", got {resume!r}')
    if not isinstance(task, Task):
        raise ConfigError(
            f"task must have init, batch, loss_and_gradients and evaluate, got {task!r}"
        )
    seed, label = check_count("seed", seed, least=0), task_name(task)
    by_default = run_directory(label)
    folder = open_directory(checkpoint_dir or by_default)
    root = folder.path if isinstance(folder, LocalDirectory) else by_default.absolute()
    history = History(root, root / "metrics.csv")
    screen = console(verbose)
    display = [ProgressDisplay(screen)] if screen is not None else []
    told = [MetricsFile(history.metrics_path), Recorder(history), *display, *callbacks]
    topology = {
        "num_workers": num_workers,
        "num_shards": num_shards,
        "replicas": replicas,
        "backend": backend,
    }
    plan = Plan(
        steps, save_every, evaluate_every, resume, RetentionPolicy(keep, keep_every, keep_every_s)
    )
    with (
        make_run_lock(LocalDirectory(root)) as here,
        nullcontext(here)
        if isinstance(folder, LocalDirectory)
        else make_run_lock(folder) as claimed,
    ):
        run = _Run(task, label, seed, root, claimed, topology, plan, told, history)
        run.run(optimizer)
    return history
