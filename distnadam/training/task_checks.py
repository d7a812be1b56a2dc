"""What a task must be, beyond having the methods: that they take what they are given, and give the
same for the same.

It knows tasks and arrays. No workers, no files.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xxhash

from distnadam.errors import ConfigError, StructureError, TrainingError
from distnadam.tensors.leaves import as_numpy
from distnadam.training.task import Task
from distnadam.training.task_state import StatefulTask, state_of

ATTRIBUTE = "deterministic"
"""Of a task: False says that it is knowingly not so."""
_OTHERWISE = f"; or, if that is meant, give the task the attribute {ATTRIBUTE} = False"


def check_methods(task: Task, label: str, accumulate: int, *, scaled: bool) -> None:
    """Raise ConfigError unless a task's methods take what they are given beside the usual."""
    if accumulate > 1:
        takes = "each micro-batch's number, as in batch(step, rank, world_size, micro_batch=0)"
        asked = f"accumulate={accumulate}"
        _check_takes(label, task.batch, (0, 0, 1), "micro_batch", asked, takes)
    if scaled:
        takes = "the scale, as in loss_and_gradients(params, batch, loss_scale=1.0)"
        _check_takes(label, task.loss_and_gradients, (0, 0), "loss_scale", "loss_scale", takes)


def _check_takes(
    label: str,
    method: Callable[..., Any],
    given: tuple[Any, ...],
    name: str,
    asked: str,
    takes: str,
) -> None:
    """Raise ConfigError unless a task's method takes an argument that `asked` needs, by name."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # of what is not written in Python; its call will tell
        return
    try:
        signature.bind(*given, **{name: 0})
    except TypeError as error:
        raise ConfigError(
            f"{asked}: task {label!r} must take {takes}; it has {method.__name__}{signature}"
        ) from error


def metrics_of(found: Any, location: str) -> dict[str, float]:
    """Return what a task's `evaluate` returned, as numbers by name.

    Raises:
        TrainingError: it is something else; the message begins with `location`.
    """
    if not isinstance(found, Mapping):
        got = f"got {type(found).__name__}"
        raise TrainingError(f"{location}: expected a dict of numbers by name, {got}")
    metrics = {}
    for name, value in found.items():
        try:
            metrics[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError is torch's
            got = f"got {type(value).__name__} ({error})"
            raise TrainingError(f"{location}: {name}: expected a number, {got}") from error
    return metrics


def is_deterministic(task: Task) -> bool:
    """Whether a task says of itself that it is deterministic, which all do that say nothing."""
    return bool(getattr(task, ATTRIBUTE, True))


def repeated(
    task: Task,
    location: str,
    batch_of: Callable[[], Any],
    compute: Callable[[Any], tuple[float, Any]],
) -> tuple[Any, float, Any]:
    """Return a batch, its loss and its gradients, once both methods gave the same twice.

    The task's own state, if it keeps one, is that after one call of each.

    Args:
        task: whose methods they are.
        location: with which the error begins.
        batch_of: calls the task's `batch`.
        compute: calls its `loss_and_gradients` on a batch.

    Raises:
        ConfigError: a method gave something else the second time; the message names it.
    """
    before = state_of(task) if isinstance(task, StatefulTask) else None
    batch = batch_of()
    batch_once = fingerprint(batch)
    results_once = fingerprint(_results(compute(batch)))
    if isinstance(task, StatefulTask):
        task.load_state(before)
    batch = batch_of()
    if (where := difference(batch_once, fingerprint(batch))) is not None:
        raise ConfigError(
            f"{location}: batch gives another batch when it is asked again for the same step, rank "
            f"and world_size{where}, so a rank that is started again would train on other data: "
            "draw it from numpy.random.default_rng([seed, step, rank, world_size])" + _OTHERWISE
        )
    loss, gradients = compute(batch)
    if (where := difference(results_once, fingerprint(_results((loss, gradients))))) is not None:
        raise ConfigError(
            f"{location}: loss_and_gradients gives something else for the same parameters and "
            f"batch{where}, so a run that recovers would end with other bits: seed what it draws "
            "(dropout) by the batch, and use the framework's deterministic algorithms" + _OTHERWISE
        )
    return batch, loss, gradients


def _results(pair: tuple[float, Any]) -> dict[str, Any]:
    loss, gradients = pair
    return {"the loss": float(loss), "gradients": gradients}


def fingerprint(tree: Any, path: str = "") -> dict[str, Any]:
    """Return by path what each leaf of a tree is: of an array, its dtype, shape and a hash of its
    bytes, which stays what it is when the array is written again.
    """
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {path: _leaf(tree)}
    found: dict[str, Any] = {f"{path}/": len(tree)}
    for key, value in items:
        found |= fingerprint(value, f"{path}/{key}")
    return found


def _leaf(value: Any) -> Any:
    if not hasattr(value, "__array__"):
        return value
    try:
        array = np.ascontiguousarray(as_numpy(value))
        return (
            str(array.dtype),
            array.shape,
            xxhash.xxh3_128_digest(array.reshape(-1).view(np.uint8).data),
        )
    except (StructureError, TypeError, ValueError):  # of objects
        return value


def difference(once: Mapping[str, Any], again: Mapping[str, Any]) -> str | None:
    """Return where two fingerprints differ, in words to follow others; None if they do not."""
    if once.keys() != again.keys():
        return " (of another structure)"
    for path, value in once.items():
        if not _equal(value, again[path]):
            named = path.strip("/")
            return f" (in {named})" if named else ""
    return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    try:
        compares: Any = type(a).__eq__
        return bool(a == b) or compares is object.__eq__  # which says nothing of its content
    except Exception:
        return True
