"""The examples in the public docstrings run as they stand, and no public method lacks one."""

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distnadam
from distnadam import DistAdam, DistAdamW, DistNadam, DistNadamW, Group, Worker, fit, schedules
from distnadam.hyperparameters import NadamConfig

INTERNAL = {"shards", "saves", "session", "of", "follow"}
NEEDS_RAY = {"connect", "stop"}
NAMES = {"np": np, "DistNadam": DistNadam, "DistNadamW": DistNadamW, "DistAdam": DistAdam}
NAMES |= {"DistAdamW": DistAdamW, "Group": Group, "NadamConfig": NadamConfig, "fit": fit}
NAMES |= {name: getattr(schedules, name) for name in schedules.__all__}
SCHEDULES = [schedules.OneCycle, schedules.CosineRestarts, schedules.Polynomial]
SCHEDULES += [schedules.InverseSquareRoot, schedules.Warmup, schedules.Sequential]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(thing: Any) -> list[doctest.DocTest]:
    """The examples in the docstrings of a module, class or function, and of a class's methods."""
    found = doctest.DocTestFinder(recurse=isinstance(thing, type)).find(
        thing, getattr(thing, "__name__", None), globs=NAMES
    )
    return [test for test in found if test.examples]


@pytest.mark.parametrize(
    "thing",
    [
        distnadam,
        Worker,
        fit,
        schedules,
        *SCHEDULES,
        Group,
        DistNadamW,
        DistAdam,
        DistAdamW,
        NadamConfig,
    ],
    ids=lambda thing: thing.__name__,
)
def test_the_examples_run(thing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), list[str]()
    assert examples(thing)
    for test in examples(thing):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("cls", [DistNadam, Worker])
def test_every_public_method_is_used_in_an_example(cls: type) -> None:
    tests = [*examples(distnadam), *examples(cls), *examples(fit)]
    code = "".join(example.source for test in tests for example in test.examples)
    public = {name for name in vars(cls) if not name.startswith("_")} - INTERNAL - NEEDS_RAY
    assert len(public) > 5
    assert {name for name in public if f".{name}" not in code} == set()
