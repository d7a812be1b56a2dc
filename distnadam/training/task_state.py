"""A task's own state: what training changes and no gradient does, such as BatchNorm's averages.

It knows tasks and plain data. No workers, no files.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import numpy as np

from distnadam.checkpoint.contents import packed_data
from distnadam.errors import ConfigError, StructureError, TrainingError
from distnadam.tensors.leaves import as_numpy
from distnadam.training.task import Task

_KEY = "task_state"
_METHODS = ("state", "load_state")
_MOST_SHOWN = 5


@runtime_checkable
class StatefulTask(Task, Protocol):
    """A task with the two methods that `Task` says are optional."""

    def state(self) -> Any:
        """Return the state, as `Task` says."""

    def load_state(self, state: Any) -> None:
        """Take a state."""


class TaskState:
    """The state of one run's task, where it keeps one: rank 0's, as it was last asked for.

    Args:
        task: after its `init`.

    Raises:
        ConfigError: it has one of the two methods, or a state that no checkpoint can hold.
    """

    def __init__(self, task: Task) -> None:
        found = [name for name in _METHODS if callable(getattr(task, name, None))]
        if len(found) == 1:
            raise ConfigError(
                f"task: has {found[0]} and not {(set(_METHODS) - set(found)).pop()}; a task that "
                "keeps state of its own needs both, another one neither"
            )
        self.is_kept = isinstance(task, StatefulTask)
        self._initial = state_of(task) if isinstance(task, StatefulTask) else None
        self._present = self._initial
        packed_data(self.data)
        if not self.is_kept:
            _warn_of_buffers(task)

    @property
    def data(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {_KEY: self._present} if self.is_kept else {}

    def begin(self, saved: Mapping[str, Any] | None, *tasks: Task) -> None:
        """Have tasks take the state in a checkpoint's data; the one after `init` if there is none.

        The data is of a checkpoint that `why_not` has nothing against.
        """
        self.take(self._initial if saved is None else saved.get(_KEY), *tasks)

    def take(self, state: Any, *tasks: Task) -> None:
        """Have tasks take a state, each one of its own."""
        if not self.is_kept:
            return
        self._present = state
        for task in tasks:
            assert isinstance(task, StatefulTask)
            task.load_state(deepcopy(state))

    def why_not(self, saved: Mapping[str, Any]) -> str | None:
        """Return why a run cannot go on from a checkpoint's data, or None if it can."""
        if self.is_kept and _KEY not in saved:
            return (
                "holds no state of the task: it was saved from outside the run, or before the task "
                "had its method state"
            )
        if not self.is_kept and _KEY in saved:
            return "holds a state of the task, which has no methods state and load_state now"
        return None


def state_of(task: StatefulTask) -> Any:
    """Return a task's state, its arrays being NumPy's and nobody else's.

    Raises:
        TrainingError: it holds an array that cannot be read.
    """
    return _kept(task.state(), "state")


def _kept(node: Any, path: str) -> Any:
    if isinstance(node, Mapping):
        return {key: _kept(value, f"{path}/{key}") for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        kept = [_kept(value, f"{path}/{i}") for i, value in enumerate(node)]
        return kept if isinstance(node, list) else tuple(kept)
    if not hasattr(node, "__array__") or isinstance(node, np.generic):
        return node
    try:
        return np.array(as_numpy(node))
    except StructureError as error:
        raise TrainingError(f"the task's {path}: {error}") from error


def _warn_of_buffers(task: Task) -> None:
    """Warn of buffers of a framework's modules, which are no parameters and are not saved."""
    found = [
        f"{name}.{buffer}"
        for name, value in getattr(task, "__dict__", {}).items()
        for module in _parts(value)
        for buffer in _buffers(module)
    ]
    if found:
        more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
        warnings.warn(
            f"the task keeps state that is no parameter ({', '.join(found[:_MOST_SHOWN])}{more}): "
            "no checkpoint holds it, and evaluate sees it as init left it, since each worker "
            "changes its own. Give the task the methods state() and load_state(state), see "
            "distnadam.training.task.Task; if training never changes it, have state return {}",
            stacklevel=4,
        )


def _parts(value: Any) -> Iterator[Any]:
    """Yield an attribute's value, or the items of a container."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


def _buffers(module: Any) -> list[str]:
    """Return the names of what a torch module saves beside its parameters, or of what a Keras model
    does not train; none for anything else.
    """
    with suppress(Exception):  # of an object that is not ours, and only looks like one
        if callable(getattr(module, "named_buffers", None)):
            saved = module.state_dict()
            return [name for name, _ in module.named_buffers() if name in saved]
        if callable(getattr(module, "get_layer", None)):
            return [getattr(v, "path", v.name) for v in module.non_trainable_variables]
    return []
