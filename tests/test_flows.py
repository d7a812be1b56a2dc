"""ARCHITECTURE.md tells the truth: its tree is there, its flows' functions exist and run in order.

A flow is traced where it runs in this process: a step, a save and a reshard of a local optimizer,
a recovery in the simulation. What only Ray runs (``backends/ray/``, ``transport/``) is looked up by
name alone.
"""

import ast
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.worker import Worker
from tests.simulation.backend import WorldBackend, begin_world
from tests.test_architecture import PURE

PACKAGE = Path(__file__).parent.parent / "distnadam"
DOCUMENT = (PACKAGE / "ARCHITECTURE.md").read_text()
STEP = re.compile(r"`([\w/]+\.py):([\w.]+)`")
NOT_TRACED = ("backends/ray/", "transport/")


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", DOCUMENT, re.M | re.S)
    assert found is not None, f"ARCHITECTURE.md has no section {title!r}"
    return found[2]


def functions(text: str) -> list[tuple[str, str]]:
    return STEP.findall(text)


def defined(path: str) -> set[str]:
    """The qualified names of a module's functions, methods and classes."""
    names: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")

    walk(ast.parse((PACKAGE / path).read_text()).body, "")
    return names


@contextmanager
def traced() -> Iterator[list[tuple[str, str]]]:
    """Record the functions of the package that run, by their first call, in any thread."""
    seen: dict[CodeType, None] = {}
    order: list[tuple[str, str]] = []
    root = f"{PACKAGE}/"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in seen:
            seen[code] = None
            if code.co_filename.startswith(root):
                order.append((code.co_filename.removeprefix(root), code.co_qualname))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield order
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # None ends it, as the docs say


def a_step(tmp_path: Path) -> list[tuple[str, str]]:
    with DistNadam(num_shards=2, backend="local").build({"w": np.ones(5000, np.float32)}) as o:
        worker = o.worker(0)
        worker.step({"w": np.ones(5000, np.float32)})
        with traced() as order:
            worker.step({"w": np.ones(5000, np.float32)})
        worker.close()
    return order


def a_save(tmp_path: Path) -> list[tuple[str, str]]:
    with DistNadam(num_shards=2, backend="local").build({"w": np.ones(5000, np.float32)}) as o:
        o.apply_gradients({"w": np.ones(5000, np.float32)})
        with traced() as order:
            o.save(tmp_path, wait=False).result()
    return order


def a_reshard(tmp_path: Path) -> list[tuple[str, str]]:
    with (
        DistNadam(num_shards=2, backend="local").build({"w": np.ones(5000, np.float32)}) as o,
        traced() as order,
    ):
        o.reshard(3)
    return order


def a_recovery(tmp_path: Path) -> list[tuple[str, str]]:
    ones = np.ones(3000, np.float32)
    options = Options(step_timeout_s=5.0, kernel="numpy")
    world, layout = begin_world(ones, NadamConfig(), options, 2, 1, 1)
    worker = Worker(ShardGroup(WorldBackend(world), layout, options, poll_s=0.0), 0)
    worker.step({"w": ones})
    world.look()
    world.shards[0].kill()
    with traced() as order:
        worker.step({"w": ones})
    assert world.supervisor.recoveries["promoted"] == 1
    return order


TRACES: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "A step": a_step,
    "A save": a_save,
    "A recovery": a_recovery,
    "A reshard": a_reshard,
}


def test_every_function_that_the_document_names_exists() -> None:
    named = set(functions(DOCUMENT))
    assert len(named) > 40
    assert {(path, name) for path, name in named if name not in defined(path)} == set()


@pytest.mark.parametrize("title", TRACES)
def test_a_flow_is_a_numbered_list_of_functions(title: str) -> None:
    items = re.findall(r"^\d+\. (.*?)(?=^\d+\. |\Z)", section(title), re.M | re.S)
    assert len(items) >= 5
    assert all(STEP.search(item) for item in items)


@pytest.mark.parametrize("title", TRACES)
def test_a_flow_runs_in_the_order_of_its_list(title: str, tmp_path: Path) -> None:
    items = section(title)[section(title).index("\n1. ") :]
    listed = [f for f in functions(items) if not f[0].startswith(NOT_TRACED)]
    order = TRACES[title](tmp_path)
    missing = [function for function in listed if function not in order]
    assert missing == []
    positions = [order.index(function) for function in listed]
    assert positions == sorted(positions)


def test_the_tree_names_every_folder_and_module_at_top_level() -> None:
    there = {
        path.name + "/" if path.is_dir() else path.name
        for path in PACKAGE.iterdir()
        if (path.is_dir() and path.name != "__pycache__") or path.suffix == ".py"
    }
    rows = "".join(re.findall(r"^\|.*", section("The tree"), re.M))
    named = set(re.findall(r"[\w.]+/|\w+\.py", rows))
    assert there - named == set()
    assert {name for name in named if not any(PACKAGE.rglob(name.rstrip("/")))} == set()


def test_the_tree_calls_pure_what_is_held_to_be() -> None:
    rows = re.findall(r"^\| (.+?) \| \*pure\*", section("The tree"), re.M)
    said = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert said == {name for name in PURE if "/" not in name}


def test_the_glossary_has_about_two_dozen_words() -> None:
    words = re.findall(r"^- \*\*(.+?)\*\*", section("Glossary"), re.M)
    assert len(words) >= 20
    assert len(set(words)) == len(words)
