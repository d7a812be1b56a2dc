"""The built-in tasks, by name; each is imported where it is asked for."""

from importlib import import_module

from distnadam.training.task import Task

BUILT_IN = {
    "digits": ("digits", "Digits"),
    "digits-torch": ("digits_torch", "DigitsTorch"),
    "charlm": ("charlm", "CharLM"),
}
"""Each task's module here, and its class."""


def built_in(name: str) -> Task:
    """Return a built-in task."""
    module, kind = BUILT_IN[name]
    task: Task = getattr(import_module(f"{__name__}.{module}"), kind)()
    return task
