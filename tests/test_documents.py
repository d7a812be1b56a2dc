"""Documents name files, modules, commands and options that exist."""

import re
from pathlib import Path

import click
import pytest

from distnadam.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distnadam"
FOLDERS = (".", ".github", "benchmarks", "deploy", "distnadam", "distnadam/*", "tests/*")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")
)
FILE = re.compile(r"(?<![\w/.{])((?:[\w-]+/)+[\w-]+\.(?:py|md|sh|toml|yaml|yml))\b")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
MODULE = re.compile(r"python3? -m ((?:benchmarks|distnadam|tests)[\w.]*\w)")
COMMAND = re.compile(r"distnadam ([a-z]+)\b((?:(?: +| *\\\n *)[^\s`|\\]+)*)")
NO_FILES = ("RUN/",)
"""What stands for a directory of the reader's."""
KINDS_OF_CHANGE = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""As Keep a Changelog names them."""


def text_of(document: str) -> str:
    """A document; the newest section of the changelog, as others tell of the past."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.split("\n## [")[1] if document == "CHANGELOG.md" else text


def missing_files(document: str) -> set[str]:
    """Files that are neither below the root, nor in the package, nor beside the document."""
    text, beside = text_of(document), (ROOT / document).parent
    named = {*FILE.findall(text), *(LINK.findall(text) if document.endswith(".md") else ())}
    return {
        name
        for name in named
        if not name.startswith(NO_FILES)
        and not any((folder / name).exists() for folder in (ROOT, PACKAGE, beside))
    }


def unknown_options(text: str) -> set[str]:
    """Options in command lines of ours that their command has not."""
    found = set()
    for name, rest in COMMAND.findall(text):
        command = main.commands.get(name)
        if command is None:
            continue  # prose, as "distnadam on"
        known = {opt for each in command.params for opt in (*each.opts, *each.secondary_opts)}
        given = re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)
        found |= {f"{name} {option}" for option in given if option not in {*known, "--help"}}
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document: str) -> None:
    text = text_of(document)
    assert missing_files(document) == set()
    modules = {name.replace(".", "/") for name in MODULE.findall(text)}
    assert {
        name
        for name in modules
        if not any((ROOT / f"{name}{end}").is_file() for end in (".py", "/__main__.py"))
    } == set()
    assert unknown_options(text) == set()


def test_a_file_that_the_sources_name_is_there() -> None:
    sources = [path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")]
    assert {name: missing for name in sources if (missing := missing_files(name))} == {}


def test_the_checks_find_what_is_not_there() -> None:
    assert isinstance(main, click.Group)
    assert unknown_options("`distnadam train digits --worker 2 --shards 2`") == {"train --worker"}
    assert unknown_options("    distnadam plan --hosts 2 \\\n        --no-such") == {
        "plan --no-such"
    }
    assert FILE.findall("see `checkpoint/gone.py`, ./here.sh") == ["checkpoint/gone.py"]
    assert len(DOCUMENTS) >= 10


def test_a_release_has_each_kind_of_change_once() -> None:
    for release in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## [")[1:]:
        kinds = re.findall(r"^### (.*)", release, re.MULTILINE)
        assert kinds == [kind for kind in KINDS_OF_CHANGE if kind in kinds]
        for each in release.split("\n### ")[1:]:
            areas = re.findall(r"^#### (.*)", each, re.MULTILINE)
            assert len(areas) == len(set(areas))


def test_every_benchmark_is_in_its_page() -> None:
    modules = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py"}
    page = text_of("benchmarks/README.md")
    assert {name for name in modules - {"__main__.py"} if f"`{name}`" not in page} == set()
