"""The tests that deploy/SECURITY.md names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "deploy" / "SECURITY.md").read_text()


def named(text: str) -> list[tuple[str, str]]:
    """Return the tests that a text names, by file; without a file, in the one named before."""
    found, file = [], ""
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = path or file
        found.append((file, test))
    return found


@pytest.mark.parametrize(("file", "test"), named(TEXT))
def test_each_test_that_the_document_names_is_there(file: str, test: str) -> None:
    source = ast.parse((ROOT / file).read_text())
    assert test in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}


def test_the_document_names_every_test_of_this_directory() -> None:
    here = {f"tests/security/{path.name}" for path in Path(__file__).parent.glob("test_*.py")} - {
        "tests/security/test_document.py"
    }
    assert here == {file for file, _ in named(TEXT) if file.startswith("tests/security/")}
    assert len(named(TEXT)) >= 25
