"""The commands `train`, which runs `fit` on a task, and `plot`, which draws its loss."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from distnadam.cli import run_file
from distnadam.cli.group import JSON, Sectioned, echo_json, exit_on_error, main
from distnadam.cli.optimizer_options import (
    OPTIMIZER_OPTIONS,
    SCHEDULE_ROWS,
    asked_rate,
    optimizer_asked_for,
    optimizer_options,
)
from distnadam.cli.placement_options import placement
from distnadam.cli.restarting import ChildRun, end_if_stuck, in_child, saved
from distnadam.cli.resuming import Reached, end_alone, how_to_resume
from distnadam.cli.run_file import RunFile
from distnadam.cli.task_names import load_task
from distnadam.config import BackendName, Options, Settings
from distnadam.errors import RayLost
from distnadam.optimizer import DistNadam
from distnadam.places import local_path, shown
from distnadam.training.callbacks import Callback
from distnadam.training.fit import fit
from distnadam.training.history import History
from distnadam.training.plot import plot_loss
from distnadam.training.preflight import Preflight, preflight
from distnadam.training.progress import Verbose
from distnadam.training.run_plan import RetentionPolicy, RunPlan

_PASSED_TO_FIT = (
    "num_workers",
    "num_shards",
    "replicas",
    "steps",
    "seed",
    "checkpoint_dir",
    "save_every",
    "keep",
    "evaluate_every",
    "accumulate",
    "resume",
)
"""Options that are arguments of `fit`, under the same names."""
_SECTIONS = {
    "Run": (
        *("num_workers", "num_shards", "replicas", "name", "steps", "seed", "local"),
        *("accumulate", "evaluate_every", "stop_grace_s", "dry_run"),
    ),
    "What is shown": ("verbose", "quiet", "dashboard", "as_json"),
    "Optimizer, by default that of the run that is resumed": OPTIMIZER_OPTIONS,
    "Checkpoints": ("checkpoint_dir", "save_every", "keep", "resume"),
    "Placement": (
        *("shard_cpus", "worker_cpus", "worker_gpus", "shard_label", "worker_label"),
        *("start_timeout", "port_range"),
    ),
}
"""The options by purpose, as `--help` lists them."""
_MEANS = {
    "steps_per_s": " (the steps alone)",
    "seconds": " (with start, evaluation and saving)",
}
"""What is said of a line of the summary."""


@main.command(
    cls=Sectioned,
    sections=_SECTIONS,
    notes={"Schedules of --lr-schedule; a field without a default is required": SCHEDULE_ROWS},
)
@click.argument("task")
@click.option(
    "--workers",
    "num_workers",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Data-parallel workers.",
)
@click.option(
    "--shards",
    "num_shards",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Shards of the optimizer.",
)
@click.option(
    "--replicas",
    default=0,
    show_default=True,
    type=click.IntRange(0, 1),
    help="Standbys of each shard.",
)
@click.option(
    "--name",
    help="Name of the optimizer, by which `distnadam status`, `save`, `reshard` and `stop` find "
    "it.",
)
@click.option(
    "--steps",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="Steps in all, those before a resume included.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Seed of the parameters and batches.",
)
@optimizer_options
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--checkpoint-dir",
    metavar="PATH|URL",
    help="Where to write, and to resume from.  [default: runs/TASK-TIME/]",
)
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints.")
@click.option(
    "--keep", default=3, show_default=True, type=click.IntRange(1), help="Checkpoints to keep."
)
@click.option(
    "--accumulate",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Micro-batches in each step of a worker; TASK's batch must take micro_batch.",
)
@click.option("--evaluate-every", type=click.IntRange(1), help="Steps between evaluations.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "must", "never"]),
    default="auto",
    show_default=True,
    help="Whether to resume.",
)
@click.option(
    "--stop-grace",
    "stop_grace_s",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="After SIGTERM, save within so long.  [default: 25]",
)
@placement
@click.option(
    "--dashboard",
    is_flag=False,
    flag_value="0",
    metavar="[[HOST:]PORT]",
    help="Serve the page of `report` while the run goes on, to this host unless HOST says "
    "otherwise, at PORT, or at a free one.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only try the task, the directory and the start of shards and workers, and print the "
    "plan.",
)
@click.option(
    "--verbose",
    type=click.Choice(["auto", "0", "1", "2"]),
    default="auto",
    show_default=True,
    help="What is shown, as in Keras: 0 nothing, 1 a live panel, or a line every few seconds where "
    "there is no terminal, 2 a line for each evaluation; auto means 1.",
)
@click.option("--quiet", is_flag=True, help="As --verbose 0.")
@JSON
@click.pass_context
def train(context: click.Context, /, task: str, **options: Any) -> None:
    """Train TASK: digits, digits-torch or charlm, or a class or object of your own as MODULE:NAME
    or FILE.py:NAME; or RUN/run.toml, which a run writes in its directory: it has the task and the
    options, and makes a new run of them.

    If the Ray that it started dies, the run goes on in a new one; if one at RAY_ADDRESS dies, the
    exit status is 75: give the command again, once that Ray is back.
    """
    with exit_on_error():
        if task.endswith(".toml"):
            run_file.read(Path(local_path(task, "TASK")), context)
            task, options = context.params["task"], {**context.params}
            del options["task"]
        rate = asked_rate(options)
    run = in_child() if context.obj and _starts_ray(options) else None
    if run is not None and run.goes_on_in is not None:
        options["checkpoint_dir"] = options["checkpoint_dir"] or run.goes_on_in
        options["resume"] = "auto"
    reached = Reached(options["checkpoint_dir"])
    if context.obj and not (options["local"] or options["dry_run"]):
        end = run.end if run is not None else partial(end_alone, context, reached)
        end_if_stuck(end, lambda: reached.directory or options["checkpoint_dir"])
    with (
        how_to_resume(context, reached),
        exit_on_error(),
        _anew_if_ray_dies(run, reached),
        # Ray prints to standard output, where only the summary belongs
        contextlib.redirect_stdout(sys.stderr),
    ):
        optimizer = optimizer_asked_for(
            options, rate, name=options["name"], options=_placement_of(options)
        )
        backend: Literal["local", "ray"] = "local" if options["local"] else "ray"
        if options["dry_run"]:
            tried = _tried(task, optimizer, backend, options)
        else:
            callbacks = [reached, RunFile(context, _SECTIONS), *_dashboard(options["dashboard"])]
            history = _trained(task, optimizer, backend, callbacks, options)
    if options["dry_run"]:
        sys.exit(_print_plan(tried, as_json=options["as_json"]))
    _print_summary(_summary(history), as_json=options["as_json"])


@main.command()
@click.argument("run")
@click.option("--output", help="The picture.  [default: RUN/loss.png]")
def plot(run: str, *, output: str | None) -> None:
    """Draw the loss of a run, whose metrics.csv is in the directory RUN."""
    with exit_on_error():
        directory = Path(local_path(run, "RUN"))
        picture = directory / "loss.png" if output is None else Path(local_path(output, "--output"))
        click.echo(plot_loss(directory / "metrics.csv", picture))


def _placement_of(options: Mapping[str, Any]) -> Options:
    return Options(
        shard_cpus=options["shard_cpus"],
        worker_cpus=options["worker_cpus"],
        worker_gpus=options["worker_gpus"],
        label_selector=options["shard_label"],
        worker_label_selector=options["worker_label"],
        start_timeout_s=options["start_timeout"],
        port_range=options["port_range"],
    )


def _trained(
    task: str,
    optimizer: DistNadam,
    backend: BackendName,
    callbacks: list[Callback],
    options: Mapping[str, Any],
) -> History:
    """Train, and return the history of the run."""
    grace = options["stop_grace_s"]
    return fit(
        load_task(task),
        optimizer=optimizer,
        backend=backend,
        callbacks=callbacks,
        verbose=_verbosity(options),
        **{name: options[name] for name in _PASSED_TO_FIT},
        **({} if grace is None else {"stop_grace_s": grace}),
    )


def _verbosity(options: Mapping[str, Any]) -> Verbose:
    asked: str = "0" if options["quiet"] else options["verbose"]
    return "auto" if asked == "auto" else int(asked)


def _dashboard(asked: str | None) -> list[Callback]:
    """Return what serves the page on the run, if that is asked for."""
    if asked is None:
        return []
    from distnadam.report.dashboard import Dashboard, address_of

    host, port = address_of(asked)
    dashboard = Dashboard(host, port, lambda url: dashboard.run.say(f"dashboard: {url}"))
    return [dashboard]


def _tried(
    task: str, optimizer: DistNadam, backend: BackendName, options: Mapping[str, Any]
) -> Preflight:
    """Return the plan of a run and what is wrong with it."""
    topology = ("num_workers", "num_shards", "replicas")
    config = optimizer.get_config() | {name: options[name] for name in topology}
    plan = RunPlan(
        **{name: options[name] for name in ("steps", "save_every", "evaluate_every", "accumulate")},
        keep=RetentionPolicy(last=options["keep"], every=None, every_s=None),
    )
    return preflight(
        load_task(task),
        Settings.of(**(config | {"backend": backend})),
        plan,
        is_given=True,
        say=lambda text: click.echo(text, err=True),
        **{name: options[name] for name in ("seed", "checkpoint_dir", "resume")},
    )


def _print_plan(found: Preflight, *, as_json: bool) -> int:
    """Print what was found, and return the exit status."""
    if as_json:
        echo_json({"plan": dict(found.plan), "problems": found.problems})
    else:
        for name, value in found.plan:
            click.echo(f"{name:<12} {value}")
    for problem in found.problems:
        click.echo(f"problem: {problem}", err=True)
    return 1 if found.problems else 0


def _starts_ray(options: Mapping[str, Any]) -> bool:
    """Whether the run would have a Ray of its own."""
    ray = sys.modules.get("ray")
    joined = ray is not None and ray.is_initialized()
    return not (options["local"] or options["dry_run"] or os.environ.get("RAY_ADDRESS") or joined)


@contextlib.contextmanager
def _anew_if_ray_dies(run: ChildRun | None, reached: Reached) -> Iterator[None]:
    """End the process if Ray itself died, for its parent to begin the run anew; without a parent
    raise what is saved.
    """
    try:
        yield
    except RayLost as error:
        if error.checkpoint_dir is None:
            raise
        if run is not None:
            run.end(error)
        reached.saw(error)
        raise RayLost(saved(error)) from error


def _print_summary(summary: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        echo_json(summary)
        return
    for key, value in summary.items():
        if value:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            click.echo(f"{key.replace('_', ' '):<12} {text}{_MEANS.get(key, '')}")


def _summary(history: History) -> dict[str, Any]:
    saved = history.checkpoints[-1] if history.checkpoints else history.resumed_from
    return {
        **history.metrics,
        "loss": history.losses[-1] if history.losses else None,
        "steps_per_s": round(history.steps_per_s, 1),
        "seconds": round(history.seconds, 2),
        "checkpoint": shown(str(saved)),
        "plot": str(history.plot_path) if history.plot_path else None,
        "metrics": str(history.metrics_path),
    }
