"""The command line: reads arguments, calls the library, prints. Exit codes: 0 well, 1 failed, 2 wrong usage, 130 Ctrl-C."""

import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distnadam.checkpoint import store
from distnadam.checkpoint.manifest import Manifest
from distnadam.diagnosis import diagnose
from distnadam.errors import CheckpointError, DistNadamError
from distnadam.optimizer import DistNadam
from distnadam.training.fit import fit
from distnadam.training.history import History
from distnadam.training.plot import plot_loss
from distnadam.training.task import Task

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distnadam")
def main() -> None:
    """Train with a sharded Nadam parameter server, and look after its checkpoints."""


@main.command()
@click.argument("task")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Data-parallel workers.")
@click.option("--shards", default=2, show_default=True, type=click.IntRange(1), help="Shards of the optimizer.")
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(1), help="Steps in all, those before a resume included.")
@click.option("--lr", default=0.002, show_default=True, type=float, help="Learning rate.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the parameters and batches.")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option("--checkpoint-dir", type=_PATH, help="Where to write, and to resume from.  [default: runs/TASK-TIME/]")
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(1), help="Checkpoints to keep.")
@click.option("--evaluate-every", type=click.IntRange(1), help="Steps between evaluations.")
@click.option("--resume", type=click.Choice(["auto", "must", "never"]), default="auto", show_default=True, help="Whether to resume.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@_JSON
def train(task: str, *, workers: int, shards: int, lr: float, local: bool, quiet: bool, as_json: bool, **how: Any) -> None:
    """Train TASK: "digits", or a class or object of your own as MODULE:NAME or FILE.py:NAME."""
    with _errors_told():
        history = fit(
            load_task(task),
            num_workers=workers,
            num_shards=shards,
            optimizer=DistNadam(lr=lr),
            backend="local" if local else "ray",
            verbose=not quiet,
            **how,
        )
    again = ["distnadam", "train", task, "--workers", workers, "--shards", shards, "--lr", lr, "--seed", how["seed"]]
    again += ["--steps", how["steps"], "--keep", how["keep"], "--checkpoint-dir", history.checkpoint_dir, *(["--local"] if local else [])]
    again += [x for name in ("save_every", "evaluate_every") if how[name] for x in (f"--{name.replace('_', '-')}", how[name])]
    summary = _summary(history, shlex.join(map(str, again)))
    click.echo(json.dumps(summary) if as_json else "\n".join(f"{key.replace('_', ' '):<12} {_told(v)}" for key, v in summary.items() if v))


@main.command()
@click.argument("checkpoint", type=_PATH)
@_JSON
def inspect(checkpoint: Path, *, as_json: bool) -> None:
    """Show what CHECKPOINT, or the newest valid one in a directory, holds."""
    with _errors_told():
        path, manifest, passed_over = store.find(checkpoint.absolute())
    if as_json:
        click.echo(json.dumps(_as_dict(path, manifest)))
        return
    for sentence in passed_over:
        click.echo(f"passed over: {sentence}", err=True)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{path}\nstep {manifest.iterations}, round {manifest.round}, skipped {manifest.skipped}, config {manifest.config}")
    tensors = Table("tensor", "shape", "dtype", title="tensors")
    for name, shape, dtype, _, _ in manifest.layout["tensors"]:
        tensors.add_row(Text(name), str(tuple(shape)), dtype)
    files = Table("file", "bytes", "ranges", title="shards")
    for record in manifest.files:
        files.add_row(record.name, str(record.size), ", ".join(f"{s}[{b}:{e}]" for s, (b, e) in record.ranges.items()))
    console.print(tensors)
    console.print(files)


@main.command()
@click.argument("path", type=_PATH)
@_JSON
def verify(path: Path, *, as_json: bool) -> None:
    """Verify every byte of a checkpoint, or of all in a directory; exit 1 where one is refused."""
    path = path.absolute()
    found = [path] if (path / store.MANIFEST).exists() or not store.steps(path) else store.steps(path)
    verdicts = []
    for directory in found:
        try:
            manifest = store.verify(directory)
            verdicts.append({"checkpoint": str(directory), "valid": True, "step": manifest.iterations, "reason": None})
        except CheckpointError as error:
            verdicts.append({"checkpoint": str(directory), "valid": False, "step": None, "reason": str(error)})
    if as_json:
        click.echo(json.dumps(verdicts))
    else:
        table = Table("checkpoint", "step", "verdict")
        for v in verdicts:
            table.add_row(Path(str(v["checkpoint"])).name, str(v["step"] or "-"), Text("valid" if v["valid"] else str(v["reason"])))
        Console(soft_wrap=True, highlight=False).print(table)
    if not all(v["valid"] for v in verdicts):
        sys.exit(1)


@main.command()
@click.argument("run", type=_PATH)
@click.option("--output", type=_PATH, help="The picture.  [default: RUN/loss.png]")
def plot(run: Path, *, output: Path | None) -> None:
    """Draw the loss of the run whose metrics.csv lies in RUN."""
    with _errors_told():
        click.echo(plot_loss(run / "metrics.csv", output or run / "loss.png"))


@main.command()
@_JSON
def doctor(*, as_json: bool) -> None:
    """Say what would run here: versions, Ray, shared memory, kernel, transport; exit 1 where something is wrong."""
    found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        table = Table(show_header=False)
        for key, value in found.to_dict().items():
            if key == "versions":
                for package, version in value.items():
                    table.add_row(package, version or "not installed")
            elif key != "problems":
                table.add_row(key.replace("_", " "), "not set" if value is None else str(value))
        Console(soft_wrap=True, highlight=False).print(table)
        for problem in found.problems:
            click.echo(f"problem: {problem}", err=True)
    if found.problems:
        sys.exit(1)


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


@contextmanager
def _errors_told() -> Iterator[None]:
    """Turn our errors into one sentence and exit code 1, and Ctrl-C into 130."""
    try:
        yield
    except DistNadamError as error:
        click.echo(f"distnadam: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            click.echo(note, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


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


def _as_dict(path: object, manifest: Manifest) -> Mapping[str, Any]:
    return {
        "path": str(path),
        "iterations": manifest.iterations,
        "m_schedule": manifest.m_schedule,
        "round": manifest.round,
        "skipped": manifest.skipped,
        "config": manifest.config,
        "options": manifest.options,
        "topology": manifest.topology,
        "data": manifest.data,
        "tensors": [{"path": p, "shape": s, "dtype": d, "begin": b, "end": e} for p, s, d, b, e in manifest.layout["tensors"]],
        "files": [{"name": f.name, "bytes": f.size, "ranges": f.ranges, "chunks": len(f.checksums)} for f in manifest.files],
    }


if __name__ == "__main__":
    main()
