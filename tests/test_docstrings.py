"""Every public name has a docstring with an example, and the examples run as they stand.

An error needs no example of its own: its docstring says what raises it, most are raised by a death
that an example cannot stage, and the tests beside the code raise each.
"""

import doctest
import inspect
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distnadam
from distnadam import DistNadam, Worker, errors, fit
from distnadam.client.held_state import HeldState
from tests.test_architecture import MODULES as SOURCES
from tests.test_architecture import source_of

MODULES = {
    "distnadam": "",
    "distnadam.callbacks": "",
    "distnadam.interop": "",
    "distnadam.metrics": "",
    "distnadam.schedules": "",
    "distnadam.torch": "torch",
    "distnadam.jax": "jax",
    "distnadam.keras": "keras",
    "distnadam.tf_keras": "tf_keras",
}
"""Those whose `__all__` is public, and the framework that each needs."""
OTHERS = {
    "distnadam.hyperparameters": "NadamConfig",
    "distnadam.training.callbacks": "Callback",
    "distnadam.training.data": "DatasetBatches LoaderBatches",
    "distnadam.training.history": "History",
    "distnadam.training.torch_task": "TorchTask",
}
"""What the pages name of other modules."""
SLOW = {"DatasetBatches": "ray", "LoaderBatches": "torch", "TorchTask": "torch"}
"""What those of them need; their examples are run by tests of their own too."""
INTERNAL = {"shards", "saves", "session", "of", "follow"}
NEEDS_RAY = {"connect", "stop"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def names_of(module: str) -> list[str]:
    """The public names of a module that no framework is needed for."""
    names: list[str] = import_module(module).__all__
    return names


def is_documented(thing: Any) -> bool:
    """Whether a public thing is a class or a function, which has a docstring of its own."""
    return inspect.isclass(thing) or inspect.isroutine(thing)


PLAIN = [
    pytest.param(module, name, id=f"{module}.{name}")
    for module, needs in MODULES.items()
    if not needs
    for name in names_of(module)
    if is_documented(getattr(import_module(module), name))
] + [
    pytest.param(module, name, id=f"{module}.{name}")
    for module, names in OTHERS.items()
    for name in names.split()
    if name not in SLOW
]
RUN_ELSEWHERE = {
    getattr(import_module(m), name).__module__ for m, name in (p.values for p in PLAIN)
}
NOT_PUBLIC = [
    name
    for source in SOURCES
    if ">>> " in source_of(source)
    and (name := f"distnadam.{source}".replace("/", ".").removesuffix(".__init__"))
    not in {*RUN_ELSEWHERE, *MODULES, *OTHERS, "distnadam.__init__"}
    and not any(name.startswith(f"{module}.") for module, needs in MODULES.items() if needs)
]
"""Modules whose examples are of no public name."""
FRAMEWORKS = [pytest.param(module, needs, id=needs) for module, needs in MODULES.items() if needs]


def examples(thing: Any, names: dict[str, Any] | None = None) -> list[doctest.DocTest]:
    """The examples in the docstrings of a module, class or function, and of a class's methods.

    They know NumPy, the package's public names, those of the module that defines the thing, and
    `names`.
    """
    home = vars(inspect.getmodule(inspect.unwrap(thing)) if inspect.isroutine(thing) else thing)
    home = vars(import_module(thing.__module__)) if isinstance(thing, type) else home
    known = {name: getattr(distnadam, name) for name in distnadam.__all__}
    schedules = {name: getattr(distnadam.schedules, name) for name in distnadam.schedules.__all__}
    known = {"np": np, **schedules, **known, **home, **(names or {})}
    name = getattr(thing, "__name__", "it")
    finder = doctest.DocTestFinder(recurse=isinstance(thing, type))
    found = finder.find(inspect.unwrap(thing), name, module=False, globs=known)
    return [test for test in found if test.examples]


def run_examples(thing: Any, names: dict[str, Any] | None = None) -> None:
    found = examples(thing, names)
    assert found, f"{thing}: no example"
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), list[str]()
    for test in found:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", ["distnadam", "distnadam.callbacks", "distnadam.schedules"])
def test_the_examples_of_a_module_run(module: str) -> None:
    run_examples(import_module(module))


@pytest.mark.parametrize(("module", "name"), PLAIN)
def test_the_examples_of_a_public_name_run(module: str, name: str) -> None:
    run_examples(getattr(import_module(module), name))


@pytest.mark.parametrize("module", NOT_PUBLIC)
def test_the_examples_of_what_is_not_public_run(module: str) -> None:
    own = [
        each
        for each in vars(import_module(module)).values()
        if is_documented(each) and each.__module__ == module and examples(each)
    ]
    assert own
    for each in own:
        run_examples(each)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, on JAX
@pytest.mark.parametrize(("module", "needs"), FRAMEWORKS)
def test_the_examples_of_a_framework_run(module: str, needs: str) -> None:
    os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported
    pytest.importorskip(needs)
    there = import_module(module)
    for name in there.__all__:
        run_examples(getattr(there, name), vars(there))


def public_methods(cls: type) -> dict[str, Any]:
    """A class's own methods and properties without a leading underscore."""
    found = inspect.getmembers(
        cls, lambda each: inspect.isroutine(each) or isinstance(each, property)
    )
    return {
        name: each
        for name, each in found
        if not name.startswith("_") and any(name in vars(base) for base in cls.__mro__[:-1])
    }


@pytest.mark.parametrize(("module", "name"), PLAIN)
def test_public_methods_have_docstrings(module: str, name: str) -> None:
    thing = getattr(import_module(module), name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = public_methods(thing)
        assert [method for method, each in methods.items() if not inspect.getdoc(each)] == []


@pytest.mark.parametrize("cls", [DistNadam, Worker])
def test_methods_that_take_something_say_what_they_raise(cls: type) -> None:
    silent = set()
    for name, each in public_methods(cls).items():
        given = inspect.isroutine(each) and set(inspect.signature(each).parameters) - {"self"}
        if given and not re.search(r"Raises:|\b[Rr]aise", inspect.getdoc(each) or ""):
            silent.add(name)
    assert silent - INTERNAL - {"team"} == set()


def test_errors_say_what_raises_them() -> None:
    found = {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    own = {name: each for name, each in found.items() if issubclass(each, errors.DistNadamError)}
    assert len(own) > 20
    assert [
        name for name, each in own.items() if "__doc__" not in vars(each) or not each.__doc__
    ] == []
    assert [name for name in own if name not in (errors.__doc__ or "")] == []


@pytest.mark.parametrize("cls", [DistNadam, Worker])
def test_every_public_method_is_used_in_an_example(cls: type) -> None:
    bases = [base for base in cls.__mro__ if base.__module__.startswith("distnadam")]
    tests = [test for thing in (distnadam, fit, *bases) for test in examples(thing)]
    tests += examples(vars(HeldState)["loss_scale"].fget)
    code = "".join(example.source for test in tests for example in test.examples)
    public = set(public_methods(cls)) - INTERNAL - NEEDS_RAY
    assert len(public) > 5
    assert {name for name in public if f".{name}" not in code} == set()
