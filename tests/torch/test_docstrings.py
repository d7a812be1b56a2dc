"""The examples in the docstrings of `distnadam.torch` run as they stand."""

import doctest
from typing import Any

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("torch")

import distnadam  # noqa: E402


@pytest.mark.parametrize("thing", [distnadam.torch, distnadam.torch.GradScaler])
def test_the_examples_run(thing: Any) -> None:
    runner, report = doctest.DocTestRunner(), list[str]()
    tests = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs={})
    assert sum(len(test.examples) for test in tests) > 5
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
