"""The commands about a run: train a task, and draw its loss."""

import contextlib
import importlib
import json
import shlex
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import click

from distnadam.cli.group import JSON, PATH, errors_told, main
from distnadam.config import Options
from distnadam.optimizer import DistNadam
from distnadam.training.fit import fit
from distnadam.training.history import History
from distnadam.training.plot import plot_loss
from distnadam.training.task import Task


def _labels(
    context: click.Context, option: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, str]:
    """Return KEY=VALUE pairs as a mapping; raise BadParameter naming what is none."""
    for pair in pairs:
        if not all(pair.partition("=")[::2]):
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", context, option)
    return dict(pair.split("=", 1) for pair in pairs)


PLACEMENT = [
    click.option(
        "--shard-cpus",
        default=0.0,
        type=click.FloatRange(0),
        help="CPUs that each shard asks of Ray.  [default: 0]",
    ),
    click.option(
        "--worker-cpus",
        default=0.0,
        type=click.FloatRange(0),
        help="CPUs that each worker asks of Ray.  [default: 0]",
    ),
    click.option(
        "--shard-label",
        multiple=True,
        callback=_labels,
        metavar="KEY=VALUE",
        help="Label of the Ray nodes that shards go to.",
    ),
    click.option(
        "--worker-label",
        multiple=True,
        callback=_labels,
        metavar="KEY=VALUE",
        help="Label of the Ray nodes that workers go to.",
    ),
    click.option(
        "--start-timeout",
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="Wait so long for nodes.  [default: refuse at once]",
    ),
]


def placement(command: Any) -> Any:
    """Give a command the options that say where shards and workers run, and what they ask for."""
    return reduce(lambda so_far, option: option(so_far), reversed(PLACEMENT), command)


@main.command()
@click.argument("task")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Data-parallel workers."
)
@click.option(
    "--shards",
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
@click.option("--lr", default=0.002, show_default=True, type=float, help="Learning rate.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Seed of the parameters and batches.",
)
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
@click.option("--evaluate-every", type=click.IntRange(1), help="Steps between evaluations.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "must", "never"]),
    default="auto",
    show_default=True,
    help="Whether to resume.",
)
@placement
@click.option("--quiet", is_flag=True, help="Show no progress.")
@JSON
def train(
    task: str,
    *,
    workers: int,
    shards: int,
    lr: float,
    local: bool,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Train TASK: "digits", or a class or object of your own as MODULE:NAME or FILE.py:NAME."""
    asked = {
        "--workers": workers,
        "--shards": shards,
        "--lr": lr,
        **{f"--{key.replace('_', '-')}": value for key, value in how.items()},
    }
    name = how.pop("name")
    options = Options(
        shard_cpus=how.pop("shard_cpus"),
        worker_cpus=how.pop("worker_cpus"),
        label_selector=how.pop("shard_label"),
        worker_label_selector=how.pop("worker_label"),
        start_timeout_s=how.pop("start_timeout"),
    )
    with (
        errors_told(),
        contextlib.redirect_stdout(sys.stderr),
    ):  # Ray prints there what it has to tell; the answer is the summary
        history = fit(
            load_task(task),
            num_workers=workers,
            num_shards=shards,
            optimizer=DistNadam(lr=lr, name=name, options=options),
            backend="local" if local else "ray",
            verbose=not quiet,
            **how,
        )
    asked["--checkpoint-dir"] = how["checkpoint_dir"] or history.checkpoint_dir
    summary = _summary(history, _again(task, asked, ["--local"] if local else []))
    click.echo(
        json.dumps(summary)
        if as_json
        else "\n".join(f"{key.replace('_', ' '):<12} {_told(v)}" for key, v in summary.items() if v)
    )


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
        from distnadam.training.tasks.digits import Digits

        return Digits()
    module_name, _, attribute = name.rpartition(":")
    if not module_name:
        raise click.UsageError(f"no task named {name!r}: give digits, MODULE:NAME or FILE.py:NAME")
    found: Any = getattr(_module(module_name), attribute, None)
    task = found() if isinstance(found, type) else found
    if not isinstance(task, Task):
        raise click.UsageError(
            f"{name}: expected a class or object with init, batch, loss_and_gradients and "
            f"evaluate, got {found!r}"
        )
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
            raise click.UsageError(
                f"{path}: workers import it by its name, and {module!r} cannot be one of yours: "
                "rename it"
            )
    sys.path.insert(
        0, str(folder)
    )  # so that workers, which get this path too, can import it by its name
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise click.UsageError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _again(task: str, asked: dict[str, Any], flags: list[str]) -> str:
    """Return the command that resumes: all that was asked for."""
    words: list[Any] = ["distnadam", "train", task]
    for option, value in asked.items():
        values = (
            [f"{key}={label}" for key, label in value.items()]
            if isinstance(value, dict)
            else [value]
        )
        nothing = value is None or option == "--resume" or (option.endswith("-cpus") and not value)
        words += [word for one in values if not nothing for word in (option, one)]
    return shlex.join(map(str, [*words, *flags]))


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
