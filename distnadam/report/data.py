"""Reads what runs recorded of themselves, as the plain data that the page draws.

Long curves are thinned: of each stretch of steps the lowest and the highest value stay, so that no
spike is lost; phases are means over stretches.
"""

import math
import os
import socket
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from distnadam.checkpoint import store
from distnadam.checkpoint.run_lock import is_held
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.errors import CheckpointError, TrainingError
from distnadam.training.metrics_file import StepTimes, read_evaluations, read_steps
from distnadam.training.plot import smoothed
from distnadam.training.run_record import NAME, read_events
from distnadam.training.steps import Phases

_MOST_POINTS = 2000
_MOST_STRETCHES = 150

Run = dict[str, Any]
"""One run, as plain data that JSON can hold."""


def read_run(directory: Path, *, verify: bool = True) -> Run:
    """Return a run's record.

    Args:
        directory: the run's, with its metrics.csv.
        verify: whether every byte of its checkpoints is read, for their verdict.

    Raises:
        TrainingError: the directory holds no run.
    """
    metrics_path = directory / "metrics.csv"
    if not os.path.isfile(metrics_path):
        raise TrainingError(f"{directory}: holds no run: there is no metrics.csv in it")
    steps, events = read_steps(metrics_path), _of_this_run(read_events(directory / NAME))
    start = _last(events, "start")
    end = _last(events, "end")
    began = max((i for i, each in enumerate(events) if each["event"] == "start"), default=0)
    is_over = end is not None and end in events[began:]
    known = [second for second in steps.seconds if math.isfinite(second)]
    return {
        "name": directory.resolve().name,
        "path": str(directory.resolve()),
        "task": start.get("task", "") if start else "",
        "command": start.get("command", []) if start else [],
        "started": events[0].get("time") if start else None,
        "outcome": end["outcome"] if end and is_over else _without_end(directory, start),
        "steps": (start or {}).get("configuration", {}).get("steps"),
        "reached": steps.steps[-1] if steps.steps else 0,
        "seconds": known[-1] if known else None,
        "loss": _loss(steps),
        "lr": _points(steps.steps, steps.rates),
        "metrics": _metrics(metrics_path),
        "time": _time(steps),
        "recoveries": _of(events, "recovery"),
        "resumes": _resumes(events),
        "checkpoints": _checkpoints(events, verify=verify),
        "hosts": _last(events, "hosts"),
        "configuration": _configuration(start),
    }


def _without_end(directory: Path, start: Mapping[str, Any] | None) -> str:
    """Return what became of a run that has not recorded its end, as its lock tells."""
    held, host = is_held(directory), (start or {}).get("host")
    if held:
        return "running"
    if held is None or host is None:
        return "running, or killed"
    # between hosts, not every file system shows locks
    return "killed" if host == socket.gethostname() else f"running on {host}, or killed"


def _of_this_run(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what another run recorded here, before this one began at its start."""
    anew = [i for i, each in enumerate(events) if each["event"] == "start"]
    anew = [i for i in anew if events[i].get("resumed_from") is None]
    return events[anew[-1] :] if anew else events


def _of(events: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [each for each in events if each["event"] == name]


def _last(events: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    found = _of(events, name)
    return found[-1] if found else None


def _resumes(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return at which steps a run was resumed, and how its process before had ended."""
    starts = [i for i, each in enumerate(events) if each["event"] == "start"]
    found = []
    for before, start in pairwise(starts):
        begin = next(iter(_of(events[start:], "begin")), None)
        if begin is None:
            continue
        end = _last(events[before:start], "end")
        ended = "was killed" if end is None else f"ended ({end['outcome']})"
        text = f"the run {ended}, and went on from step {begin['step']}"
        found.append({"step": begin["step"], "who": "the run", "text": text})
    return found


def _points(steps: Sequence[int], values: Sequence[float]) -> dict[str, list[Any]]:
    """Return a curve thinned to its extremes, with None where a value is not finite."""
    count = len(steps)
    kept = list(range(count))
    if count > _MOST_POINTS:
        width = math.ceil(2 * count / _MOST_POINTS)
        kept = []
        for begin in range(0, count, width):
            stretch = [i for i in range(begin, min(begin + width, count)) if values[i] == values[i]]
            lowest = min(stretch, key=values.__getitem__, default=begin)
            highest = max(stretch, key=values.__getitem__, default=begin)
            kept += sorted({lowest, highest})
    return {
        "x": [steps[i] for i in kept],
        "y": [values[i] if math.isfinite(values[i]) else None for i in kept],
    }


def _loss(steps: StepTimes) -> dict[str, Any]:
    curve = smoothed(tuple(steps.losses))
    width = max(1, math.ceil(len(curve) / _MOST_POINTS))
    finite = [loss for loss in steps.losses if math.isfinite(loss)]
    return {
        "raw": _points(steps.steps, steps.losses),
        "smooth": {
            "x": steps.steps[width - 1 :: width],
            "y": [v if math.isfinite(v) else None for v in curve[width - 1 :: width]],
        },
        "last": curve[-1] if curve and math.isfinite(curve[-1]) else None,
        "best": min(finite, default=None),
    }


def _metrics(path: Path) -> dict[str, Any]:
    """Return the curve of each metric of evaluations."""
    found: dict[str, dict[str, list[Any]]] = {}
    for step, name, value in read_evaluations(path):
        curve = found.setdefault(name, {"x": [], "y": []})
        curve["x"].append(step)
        curve["y"].append(value if math.isfinite(value) else None)
    return found


def _time(steps: StepTimes) -> dict[str, Any]:
    """Return the milliseconds of each phase, and steps per second, by stretches of steps."""
    known = [
        (step, phases)
        for step, phases in zip(steps.steps, steps.phases, strict=True)
        if math.isfinite(phases.compute)
    ]
    found: dict[str, Any] = {"x": [], "steps_per_s": [], "mean": {}}
    found |= {name: [] for name in Phases._fields}
    if not known:
        return found
    width = max(1, math.ceil(len(known) / _MOST_STRETCHES))
    for begin in range(0, len(known), width):
        stretch = known[begin : begin + width]
        mean = _mean([phases for _, phases in stretch])
        found["x"].append(stretch[len(stretch) // 2][0])
        found["steps_per_s"].append(1.0 / mean.total if mean.total > 0 else None)
        for name, seconds in mean._asdict().items():
            found[name].append(1e3 * seconds)
    overall = _mean([phases for _, phases in known])
    found["mean"] = {name: 1e3 * seconds for name, seconds in overall._asdict().items()}
    return found


def _mean(phases: Sequence[Phases]) -> Phases:
    return Phases(*(sum(column) / len(phases) for column in zip(*phases, strict=True)))


def _checkpoints(events: Sequence[Mapping[str, Any]], *, verify: bool) -> list[dict[str, Any]]:
    """Return the checkpoints that a run wrote, the last of each step, with what is true of them."""
    last = {each["step"]: each for each in _of(events, "checkpoint")}
    found = []
    for step in sorted(last):
        path, verdict = str(last[step]["path"]), "complete"
        try:
            manifest = store.load(path)
            if verify:
                store.verify(path)
                verdict = "verified"
        except CheckpointError as error:
            manifest = None
            there = bool(open_directory(path).files())
            verdict = str(error).removeprefix(f"{path}: ") if there else "removed"
        size = last[step].get("bytes")
        if manifest is not None:
            size = sum(record.size for record in manifest.files)
        found.append({"step": step, "path": path, "bytes": size, "verdict": verdict})
    return found


def _configuration(start: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what a run was made with, as rows of words."""
    if start is None:
        return {}
    rows: dict[str, Any] = {"task": start.get("task_at")}
    for name, value in start.get("configuration", {}).items():
        if isinstance(value, Mapping):
            rows |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            rows[name] = value
    rows |= {f"version of {name}": value for name, value in start.get("versions", {}).items()}
    for name in ("python", "host", "cpus"):
        rows[name] = start.get(name)
    return {name: _in_words(value) for name, value in rows.items()}


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value == [] or value == {}:
        return "none"
    return str(value)
