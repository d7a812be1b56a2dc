"""`fit`: checks its arguments, chooses directories, takes their locks, and runs a `TrainingRun`."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

from distnadam.checkpoint.run_lock import make_run_lock
from distnadam.checkpoint.storage.local import LocalDirectory
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.checks import check_count
from distnadam.client.building import check_can_start
from distnadam.config import BackendName, Options, Settings
from distnadam.copies import copied
from distnadam.errors import ConfigError, NotOpen
from distnadam.optimizer import DistNadam
from distnadam.tensors.layout import Layout
from distnadam.training.callbacks import Callback, CallbackList
from distnadam.training.history import History, Recorder
from distnadam.training.metrics_file import MetricsFile
from distnadam.training.preflight import check_disk
from distnadam.training.progress import Verbose, check_verbose, display_of, speaker
from distnadam.training.resuming import Request
from distnadam.training.run import TrainingRun
from distnadam.training.run_directory import claim_run_directory, directory_beside
from distnadam.training.run_handle import RunHandle
from distnadam.training.run_plan import RetentionPolicy, RunPlan
from distnadam.training.run_record import NAME, RunRecord
from distnadam.training.task import Task, task_name
from distnadam.training.task_checks import check_methods
from distnadam.training.task_errors import task_errors
from distnadam.training.task_state import TaskState
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
    accumulate: int = 1,
    callbacks: Sequence[Callback] = (),
    stop_grace_s: float = GRACE_S,
    verbose: Verbose = "auto",
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
            the defaults, or those of the run that is resumed. A resumed run takes over a learning
            rate that it was not given before, and the options; other hyper-parameters must be given
            as before, and stay what they were changed to in the run. While it runs, `optimizer.lr`
            and `get_config` are the run's; `on_begin` and `on_evaluate` of a callback may set `lr`
            and call `set_config`.
        backend: "auto", "local" or "ray", as for `DistNadam`; "auto" is the optimizer's, if given.
        seed: passed to `Task.init`.
        checkpoint_dir: the directory for checkpoints, metrics.csv and loss.png; None means
            a new directory, ``runs/<task>-<time>/``. If it is an fsspec URL, only the checkpoints
            go there, and the other files to such a new directory, or, if the run is resumed, to the
            one that it had in this working directory; a message says which. Its events.jsonl has
            the program's command and the settings; a run.toml is written by ``distnadam train``
            alone, since this call's objects are its program's.
        save_every: steps between checkpoints, which are written in the background; None saves only
            at the end.
        keep: how many of the last checkpoints are kept.
        keep_every: checkpoints of steps that are multiples of this are kept too.
        keep_every_s: one checkpoint in each span of so many seconds is kept too.
        resume: "auto" continues from the newest valid checkpoint in the `checkpoint_dir` that was
            given, if there is one, "must" requires one, "never" refuses a directory that holds one.
        evaluate_every: steps between evaluations; None evaluates only at the end.
        accumulate: micro-batches in each step of a rank, whose gradients' mean it pushes. With more
            than 1 the task's `batch` must take `micro_batch`, see `Task`; the loss of a step is the
            mean over them.
        callbacks: receive the events of the run. One that raises ends it, as Ctrl-C does.
        stop_grace_s: seconds that a SIGTERM leaves for the running steps and a checkpoint; then the
            process ends anyway.
        verbose: 0 shows nothing; 1 shows on standard error a live panel, or, where that is no
            terminal, a line every few seconds; 2 a line for each evaluation. "auto" means 1.

    Returns:
        Losses, metrics, checkpoints and recoveries of this call.

    Raises:
        ConfigError: an argument has a value that it cannot have, or that the run to resume cannot
            take over; or the task cannot be copied, needs a module that is not installed, or gives
            other batches or gradients for the same arguments (see `Task`).
        TrainingError: the task's code raised, or a worker's process died, and three recoveries in a
            row of one rank, or of the run, brought no new step; the message names the rank and the
            step. Or a callback raised, which the message names; a checkpoint was saved.
        CheckpointError: the checkpoint to resume from is refused, or is of another task, seed or
            model, or one cannot be written, or the disk has no room for one.
        CheckpointBusy: another run writes to `checkpoint_dir`.
        RayLost: Ray itself died; the message says what is saved. Call `fit` again, in a new
            process, with the error's `checkpoint_dir`.
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
    settings = _checked_settings(
        optimizer,
        {
            "num_workers": num_workers,
            "num_shards": num_shards,
            "replicas": replicas,
            "backend": backend,
        },
    )
    plan = RunPlan(
        steps=check_count("steps", steps),
        save_every=_every("save_every", save_every),
        evaluate_every=_every("evaluate_every", evaluate_every),
        keep=RetentionPolicy(
            last=check_count("keep", keep),
            every=_every("keep_every", keep_every),
            every_s=keep_every_s,
        ),
        accumulate=check_count("accumulate", accumulate),
    )
    _check_seconds("stop_grace_s", stop_grace_s)
    if keep_every_s is not None:
        _check_seconds("keep_every_s", keep_every_s)
    _check_kinds(task, callbacks, resume)
    seed = check_count("seed", seed, least=0)
    check_verbose(verbose)
    label = task_name(task)
    check_methods(task, label, plan.accumulate, scaled=settings.config.loss_scale is not None)
    if checkpoint_dir is None and resume == "must":
        raise ConfigError('resume="must" needs checkpoint_dir: a new run has no checkpoint')
    given = None if checkpoint_dir is None else open_directory(checkpoint_dir, "checkpoint_dir")
    with task_errors("init"):
        params = task.init(seed)
    layout = Layout.of(params)
    as_begun, state = copied(task, f"task {label!r}"), TaskState(task)
    if given is None or isinstance(given, LocalDirectory):
        checkpoint_bytes = layout.array_bytes * len(settings.config.state_arrays)
        check_disk(given or LocalDirectory(Path.cwd()), plan, checkpoint_bytes)
    # all has been checked that can be: from here on there are directories
    checkpoints = given or open_directory(claim_run_directory(label))
    is_local = isinstance(checkpoints, LocalDirectory)
    if isinstance(checkpoints, LocalDirectory):
        root, where = checkpoints.path, None
    else:  # metrics and plot still need a local directory
        root, where = directory_beside(checkpoints, label, resumes=resume != "never")
    history = History(root, root / "metrics.csv")
    record = RunRecord(
        root / NAME,
        history,
        _configuration(settings, plan, seed=seed, resume=resume),
        f"{type(task).__module__}:{type(task).__qualname__}",
    )
    displays = display_of(verbose, history)
    files = MetricsFile(history.metrics_path), Recorder(history), record
    listeners = CallbackList(
        [*files, *displays, *callbacks],
        RunHandle(
            directory=root,
            task=label,
            steps=plan.steps,
            num_workers=settings.topology.num_workers,
            evaluate_every=plan.evaluate_every,
            say=speaker(displays),
        ),
    )
    with (
        Termination(stop_grace_s) as termination,
        make_run_lock(LocalDirectory(root)) as root_lock,
        nullcontext(root_lock) if is_local else make_run_lock(checkpoints) as lock,
    ):
        if where is not None:
            listeners.on_message(where)
        TrainingRun(
            task=task,
            as_begun=as_begun,
            params=params,
            request=Request(
                label=label,
                seed=seed,
                layout=layout,
                settings=settings,
                state=state,
                is_given=optimizer is not None,
                resume=resume,
                accumulate=plan.accumulate,
            ),
            template=optimizer,
            root=root,
            lock=lock,
            plan=plan,
            callbacks=listeners,
            history=history,
            termination=termination,
        ).run()
    return history


def _checked_settings(optimizer: DistNadam | None, topology: dict[str, Any]) -> Settings:
    """Return the settings of the run: of the optimizer that was given, and how many of what.

    Raises:
        ConfigError: the optimizer cannot be a template, or says otherwise than `fit`.
    """
    if optimizer is not None and not isinstance(optimizer, DistNadam):
        raise ConfigError(f"optimizer must be a DistNadam or None, got {optimizer!r}")
    template = optimizer or DistNadam()
    config, defaults = template.get_config(), DistNadam().get_config()
    if _is_built(template):
        raise ConfigError(
            "optimizer: is built already, and fit builds its own: give one that is not, or "
            "checkpoint_dir to go on from a checkpoint"
        )
    if topology["backend"] == "auto":  # as good as not given
        topology = topology | {"backend": config["backend"]}
    for name, value in topology.items():
        if config[name] not in (value, defaults[name]):
            raise ConfigError(
                f"{name}: the optimizer was made with {config[name]!r} and fit is called with "
                f"{value!r}: give both the same, or only fit"
            )
    settings = Settings.of(**(config | topology))
    settings.config.to_dict()  # refuses a function that no checkpoint can hold
    check_can_start(settings)
    return settings


def _check_kinds(task: object, callbacks: Sequence[object], resume: str) -> None:
    """Raise ConfigError unless these are a task's object, callbacks, and a way to resume."""
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f'resume must be "auto", "must" or "never", got {resume!r}')
    if not isinstance(task, Task) or isinstance(task, type):
        hint = f": give an object of it, {task.__name__}(...)" if isinstance(task, type) else ""
        raise ConfigError(
            f"task must have init, batch, loss_and_gradients and evaluate, got {task!r}{hint}"
        )
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks must be Callbacks (of distnadam.training.callbacks), got {callback!r}"
            )


def _configuration(settings: Settings, plan: RunPlan, **others: Any) -> dict[str, Any]:
    """Return what a run is made with, as plain data: options only where they are not defaults."""
    config, defaults = settings.to_config(), Options().to_dict()
    config["options"] = {k: v for k, v in config["options"].items() if v != defaults[k]}
    return {
        "steps": plan.steps,
        "save_every": plan.save_every,
        "evaluate_every": plan.evaluate_every,
        "accumulate": plan.accumulate,
        **others,
        **config,
    }


def _is_built(optimizer: DistNadam) -> bool:
    with suppress(NotOpen):
        return optimizer.shards is not None
    return False


def _every(name: str, steps: int | None) -> int | None:
    return None if steps is None else check_count(name, steps)


def _check_seconds(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < threading.TIMEOUT_MAX:
        raise ConfigError(f"{name} must be a number of seconds above 0, got {value!r}")
