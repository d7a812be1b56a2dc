"""The commands about a run: train a task, and draw its loss."""

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from distnadam.cli.group import JSON, PATH, errors_told, main
from distnadam.optimizer import DistNadam
from distnadam.training.fit import fit
from distnadam.training.history import History
from distnadam.training.plot import plot_loss
from distnadam.training.task import Task


@main.command()
@click.argument("task")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Data-parallel workers.")
@click.option("--shards", default=2, show_default=True, type=click.IntRange(1), help="Shards of the optimizer.")
@click.option("--name", help="Name of the optimizer, by which `distnadam status`, `save`, `reshard` and `stop` find it.")
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(1), help="Steps in all, those before a resume included.")
@click.option("--lr", default=0.002, show_default=True, type=float, help="Learning rate.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the parameters and batches.")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option("--checkpoint-dir", type=PATH, help="Where to write, and to resume from.  [default: runs/TASK-TIME/]")
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(1), help="Checkpoints to keep.")
@click.option("--evaluate-every", type=click.IntRange(1), help="Steps between evaluations.")
@click.option("--resume", type=click.Choice(["auto", "must", "never"]), default="auto", show_default=True, help="Whether to resume.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@JSON
def train(task: str, *, workers: int, shards: int, lr: float, local: bool, quiet: bool, as_json: bool, **how: Any) -> None:
    """Train TASK: "digits", or a class or object of your own as MODULE:NAME or FILE.py:NAME."""
    name = how.pop("name")
    with errors_told():
        history = fit(
            load_task(task),
            num_workers=workers,
            num_shards=shards,
            optimizer=DistNadam(lr=lr, name=name),
            backend="local" if local else "ray",
            verbose=not quiet,
            **how,
        )
    again = ["distnadam", "train", task, "--workers", workers, "--shards", shards, "--lr", lr, "--seed", how["seed"]]
    again += ["--steps", how["steps"], "--keep", how["keep"], "--checkpoint-dir", history.checkpoint_dir, *(["--local"] if local else [])]
    again += ["--name", name] if name else []
    again += [x for name in ("save_every", "evaluate_every") if how[name] for x in (f"--{name.replace('_', '-')}", how[name])]
    summary = _summary(history, shlex.join(map(str, again)))
    click.echo(json.dumps(summary) if as_json else "\n".join(f"{key.replace('_', ' '):<12} {_told(v)}" for key, v in summary.items() if v))


@main.command()
@click.argument("run", type=PATH)
@click.option("--output", type=PATH, help="The picture.  [default: RUN/loss.png]")
def plot(run: Path, *, output: Path | None) -> None:
    """Draw the loss of the run whose metrics.csv lies in RUN."""
    with errors_told():
        click.echo(plot_loss(run / "metrics.csv", output or run / "loss.png"))


def load_task(name: str) -> Task:
    """Return the task of a name on the command line; raise UsageError where there is none."""
    if name == "digits":
        from distnadam.training.digits import Digits

        return Digits()
    module_name, _, attribute = name.rpartition(":")
    if not module_name:
        raise click.UsageError(f"no task named {name!r}: give digits, MODULE:NAME or FILE.py:NAME")
    found: Any = getattr(_module(module_name), attribute, None)
    task = found() if isinstance(found, type) else found
    if not isinstance(task, Task):
        raise click.UsageError(f"{name}: expected a class or object with init, batch, loss_and_gradients and evaluate, got {found!r}")
    return task


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        folder, module = Path.cwd(), name
    else:
        path = Path(name).absolute()
        if not path.is_file():
            raise click.UsageError(f"{path}: there is no such file")
        folder, module = path.parent, path.stem
        if not module.isidentifier() or module in sys.stdlib_module_names:
            raise click.UsageError(f"{path}: workers import it by its name, and {module!r} cannot be one of yours: rename it")
    sys.path.insert(0, str(folder))  # so that workers, which get this path too, can import it by its name
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise click.UsageError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _summary(history: History, resume: str) -> dict[str, Any]:
    return {
        **history.metrics,
        "loss": history.losses[-1] if history.losses else None,
        "steps_per_s": round(history.steps_per_s, 1),
        "seconds": round(history.seconds, 2),
        "checkpoint": str(history.checkpoints[-1] if history.checkpoints else history.resumed_from),
        "plot": str(history.plot_path) if history.plot_path else None,
        "metrics": str(history.metrics_path),
        "resume": resume,
    }


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
