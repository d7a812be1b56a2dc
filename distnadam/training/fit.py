"""`fit`: checks its arguments, chooses directories, takes their locks, and runs a `TrainingRun`."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from distnadam.checkpoint.run_lock import make_run_lock
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.config import BackendName, check_count
from distnadam.errors import ConfigError
from distnadam.optimizer import DistNadam
from distnadam.training.callbacks import (
    Callback,
    CallbackList,
    MetricsFile,
    ProgressDisplay,
    console,
)
from distnadam.training.checkpoint_manager import Plan, RetentionPolicy
from distnadam.training.history import History, Recorder
from distnadam.training.run import TrainingRun
from distnadam.training.task import Task, claim_run_directory, task_name
from distnadam.training.termination import GRACE_S, Termination


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
    stop_grace_s: float = GRACE_S,
    verbose: bool | Literal["auto"] = "auto",
) -> History:
    """Train a task with data-parallel workers, and return the record of the run.

    The run continues from the newest checkpoint in `checkpoint_dir`, if any, and saves one at its
    end. Workers and shards that die are replaced, with the same bits at the end.

    Args:
        task: the model and its data, see `Task`.
        steps: steps in all; those before a resume count.
        num_workers: number of ranks, each a Ray actor, or a thread in local mode.
        num_shards: number of the optimizer's shards.
        replicas: standbys per shard, 0 or 1.
        optimizer: a `DistNadam`, not built, whose hyper-parameters and options are used; None means
            the defaults.
        backend: "auto", "local" or "ray", as for `DistNadam`.
        seed: passed to `Task.init`.
        checkpoint_dir: the directory for checkpoints, metrics.csv and loss.png; None means
            a new directory, ``runs/<task>-<time>/``. If it is an fsspec URL, only the checkpoints
            go there, and the other files to such a new directory.
        save_every: steps between checkpoints, which are written in the background; None saves only
            at the end.
        keep: how many of the last checkpoints are kept.
        keep_every: checkpoints of steps that are multiples of this are kept too.
        keep_every_s: one checkpoint in each span of so many seconds is kept too.
        resume: "auto" continues from the newest valid checkpoint in the `checkpoint_dir` that was
            given, if there is one, "must" requires one, "never" refuses a directory that holds one.
        evaluate_every: steps between evaluations; None evaluates only at the end.
        callbacks: receive the events of the run.
        stop_grace_s: seconds that a SIGTERM leaves for the running steps and a checkpoint; then the
            process ends anyway.
        verbose: whether to show progress on standard error; "auto" means True.

    Returns:
        Losses, metrics, checkpoints and recoveries of this call.

    Raises:
        ConfigError: an argument has a value that it cannot have.
        TrainingError: the task's code raised, or a worker's process died, and three recoveries in a
            row of one rank, or of the run, brought no new step; the message names the rank and the
            step.
        CheckpointError: the checkpoint to resume from is refused, or is of another task, seed or
            model, or one cannot be written.
        CheckpointBusy: another run writes to `checkpoint_dir`.
        KeyboardInterrupt: Ctrl-C was pressed, and a checkpoint saved; a second Ctrl-C raises at
            once.
        SystemExit: with status 143, after a SIGTERM and a checkpoint; where `fit` runs in the main
            thread and the program has no handler of its own.

    >>> class Mean:
    ...     def init(self, seed):
    ...         return {"w": np.zeros(2, np.float32)}
    ...     def batch(self, step, rank, world_size):
    ...         return np.float32([1.0, 1.0 + rank])
    ...     def loss_and_gradients(self, params, batch):
    ...         error = params["w"] - batch
    ...         return float(error @ error), {"w": 2 * error}
    ...     def evaluate(self, params):
    ...         return {"largest": float(params["w"].max())}
    >>> history = fit(Mean(), steps=3, backend="local", checkpoint_dir="runs/mean", verbose=False)
    >>> history.steps, len(history.losses), list(history.metrics), len(history.checkpoints)
    ([1, 2, 3], 3, ['largest'], 1)
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
    if not 0 < stop_grace_s < threading.TIMEOUT_MAX:
        raise ConfigError(f"stop_grace_s must be a number of seconds above 0, got {stop_grace_s!r}")
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f'resume must be "auto", "must" or "never", got {resume!r}')
    if not isinstance(task, Task):
        raise ConfigError(
            f"task must have init, batch, loss_and_gradients and evaluate, got {task!r}"
        )
    seed = check_count("seed", seed, least=0)
    label = task_name(task)
    if checkpoint_dir is None:
        if resume == "must":
            raise ConfigError('resume="must" needs checkpoint_dir: a new run has no checkpoint')
        checkpoint_dir = claim_run_directory(label)
    checkpoints = open_directory(checkpoint_dir, "checkpoint_dir")
    # beside checkpoints at a URL, metrics and plot still need a local directory
    local = checkpoints if isinstance(checkpoints, LocalDirectory) else None
    root = local.path if local is not None else claim_run_directory(label)
    history = History(root, root / "metrics.csv")
    screen = console(verbose)
    display = [ProgressDisplay(screen)] if screen is not None else []
    plan = Plan(
        steps=steps,
        save_every=save_every,
        evaluate_every=evaluate_every,
        resume=resume,
        keep=RetentionPolicy(last=keep, every=keep_every, every_s=keep_every_s),
    )
    with (
        Termination(stop_grace_s) as termination,
        make_run_lock(LocalDirectory(root)) as root_lock,
        nullcontext(root_lock) if local is not None else make_run_lock(checkpoints) as lock,
    ):
        TrainingRun(
            task=task,
            label=label,
            seed=seed,
            root=root,
            lock=lock,
            topology={
                "num_workers": num_workers,
                "num_shards": num_shards,
                "replicas": replicas,
                "backend": backend,
            },
            plan=plan,
            callbacks=CallbackList(
                [MetricsFile(history.metrics_path), Recorder(history), *display, *callbacks]
            ),
            history=history,
            termination=termination,
        ).run(optimizer)
    return history
