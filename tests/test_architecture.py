"""Imports point one way, pure modules stay pure, Ray is said in one place, and no module outgrows its screen."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distnadam"
LAYERS = [
    ["errors", "exact", "metrics"],
    ["schedules", "arrays"],
    ["config", "layout", "filing"],
    ["nadam", "reshard", "ledger", "gate", "state", "epochs", "policy", "description"],
    ["messages"],
    ["orders", "takeover", "meter"],
    ["transitions", "members"],
    ["rounds"],
    ["machine", "weights", "gradients"],
    ["describe"],
    ["shard"],
    ["transport", "checkpoint"],
    ["supervision"],
    ["backends", "diagnosis"],
    ["controller"],
    ["saving"],
    ["flight"],
    ["seat"],
    ["worker"],
    ["optimizer", "status"],
    ["training", "interop"],
    ["cli"],
    ["__main__", "__init__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PURE = {
    "errors",
    "exact",
    "metrics",
    "meter",
    "config",
    "schedules",
    "arrays",
    "layout",
    "nadam",
    "reshard",
    "ledger",
    "gate",
    "state",
    "filing",
    "description",
    "messages",
    "transitions",
    "members",
    "rounds",
    "epochs",
    "policy",
    "orders",
    "takeover",
    "machine",
    "describe",
    "shard",
    "weights",
}
PURE_MAY_IMPORT = {"distnadam", "numpy", "ml_dtypes", "optree"} | sys.stdlib_module_names
IMPURE_STDLIB = {"socket", "threading", "subprocess", "pathlib", "time", "asyncio", "tempfile", "shutil"}
RAY_MODULES = {
    f"backends/{name}.py"
    for name in (
        *("ray", "raycalls", "raycrew", "actors", "shardactor", "supervisoractor", "cluster"),
        *("registry", "gather", "callreplica", "fencing", "exporter", "joining", "named", "placement"),
    )
}
LONGEST = {"optimizer.py": 450}  # the public face: more than half of it is docstrings


def imports(source: str) -> set[str]:
    """Every module a source imports, at any depth; `from distnadam import x` counts as distnadam.x."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {f"distnadam.{alias.name}" for alias in node.names} if node.module == "distnadam" else {node.module}
    return found


def room(module: str) -> str:
    """The part of the house that a dotted module of ours is in."""
    return [*module.split("."), "__init__"][1]


def upward(name: str, source: str) -> list[str]:
    """The imports of a module that point the wrong way."""
    ours = {room(m) for m in imports(source) if m.split(".")[0] == "distnadam"}
    return [other for other in sorted(ours) if other != name and RANK[other] >= RANK[name]]


MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_keeps_to_its_place(path: Path) -> None:
    source, name = path.read_text(), room_of(path)
    assert ast.get_docstring(ast.parse(source)), "a module says what it knows"
    assert upward(name, source) == []
    assert len(source.splitlines()) <= LONGEST.get(path.name, 300)
    outside = {m.split(".")[0] for m in imports(source)}
    if name in PURE:
        allowed = PURE_MAY_IMPORT - (IMPURE_STDLIB - ({"threading"} if name == "nadam" else set()))
        assert outside <= allowed | ({"numba"} if path.name == "fused.py" else set())
    if str(path.relative_to(PACKAGE)) not in RAY_MODULES:
        assert "ray" not in outside


def test_ray_remote_is_said_in_one_module() -> None:
    assert [p.name for p in MODULES if "ray.remote(" in p.read_text()] == ["actors.py"]


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("shard", "import distnadam.optimizer", ["optimizer"]),
        ("config", "def f():\n    from distnadam.nadam import kernels", ["nadam"]),
        ("worker", "from distnadam import training", ["training"]),
        ("cli", "from distnadam.optimizer import DistNadam", []),
    ],
)
def test_the_check_refuses_an_import_that_points_up(name: str, source: str, wrong: list[str]) -> None:
    assert upward(name, source) == wrong
