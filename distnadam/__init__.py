"""TensorFlow's Keras Nadam as a sharded parameter server on Ray, or in this process.

Importing this package imports nothing else: each public name is imported at its first use, so that
a process that hosts a shard loads what a shard needs and no training loop. No name imports Ray or
a framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distnadam.config import Options
    from distnadam.optimizer import DistNadam
    from distnadam.training.fit import fit
    from distnadam.training.task import Task
    from distnadam.worker import Worker

__all__ = ["DistNadam", "Options", "Task", "Worker", "fit"]

_HOMES = {
    "DistNadam": "distnadam.optimizer",
    "Options": "distnadam.config",
    "Task": "distnadam.training.task",
    "Worker": "distnadam.worker",
    "fit": "distnadam.training.fit",
}
_MODULES = ("config", "errors", "interop", "metrics", "schedules", "training")
"""Public modules that `import distnadam` makes available, each at its first use."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
