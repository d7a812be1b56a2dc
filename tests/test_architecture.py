"""The folder listing is the architecture: imports go down, inside a folder in no circle, pure
folders are pure, Ray has one. And a step stays short.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from tests.count_functions import trace_step

PACKAGE = Path(__file__).parent.parent / "distnadam"
ORDER = """
    errors extras reproducible_math shield versions
    threads
    checks places waiting
    tensors
    plain_data copies
    schedules
    groups loss_scale
    hyperparameters
    config
    nadam
    protocol
    shard transport metrics
    checkpoint
    runtime supervision interop planning
    backends
    client
    worker
    optimizer
    variants
    frontends
    jax keras tf_keras torch
    training
    callbacks
    report
    cli
    __main__ __init__
"""
"""Folders and modules of the package, lowest line first; each imports from lines above it here,
none from its own.
"""
LEVELS = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}

PURE = (
    "errors",
    "reproducible_math",
    "checks",
    "places",
    "plain_data",
    "copies",
    "schedules",
    "tensors",
    "groups",
    "loss_scale",
    "hyperparameters",
    "config",
    "nadam",
    "protocol",
    "shard",
    "supervision/decisions",
    "supervision/policy",
)
"""Folders and modules that compute, and do nothing else: no socket, file, clock, thread or Ray."""
PURE_IMPORTS = {
    "distnadam",
    "numpy",
    "ml_dtypes",
    "optree",
    "typing_extensions",
} | sys.stdlib_module_names - {
    *(
        "socket",
        "threading",
        "subprocess",
        "pathlib",
        "time",
        "asyncio",
        "tempfile",
        "shutil",
        "multiprocessing",
        "concurrent",
    )
}
EXCEPTIONS = {
    "nadam": {"threading", "concurrent"},
    "nadam/fused": {"pathlib"},
    "nadam/fused_loop": {"llvmlite"},
    "nadam/gather": {"pathlib"},
    "nadam/gather_loop": {"llvmlite"},
    "nadam/instructions": {"llvmlite"},
    "nadam/object_code": {"llvmlite", "pathlib"},
    "protocol/codec": {"msgpack"},
}
"""What kernels may have beside that: threads over one range, the compiler of the fused loop and
the files of its code; and what bytes are made with.
"""

RAY_FOLDER = "backends/ray/"
MOST_LINES = 400
MOST_FUNCTIONS = 30
"""That one step of one worker in local mode may pass; `python -m tests.count_functions` names them.
"""

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
)


def source_of(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text()


def imports(source: str) -> set[str]:
    """Every module that a source imports, at any depth; `from distnadam.x import y` counts as
    distnadam.x.y where that is a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if path_of(name) is not None}
            found |= modules | ({node.module} if modules != inner else set())
    return found


def path_of(name: str) -> str | None:
    """The module of the package that a dotted name is, as a path without its ending; None where it
    is none.
    """
    first, *rest = name.split(".")
    candidates = ("/".join(rest), "/".join([*rest, "__init__"]))
    return next((path for path in candidates if first == "distnadam" and path in MODULES), None)


def ours(source: str) -> set[str]:
    """The modules of the package that a source imports."""
    return {path for name in imports(source) if (path := path_of(name)) is not None}


def unit(module: str) -> str:
    """The folder at top level, or the module there, that a module is in."""
    return module.split("/")[0]


def upward(module: str, source: str) -> set[str]:
    """The imports of a module that do not go down."""
    own = unit(module)
    return {
        other for other in ours(source) if unit(other) != own and LEVELS[unit(other)] >= LEVELS[own]
    }


def is_pure(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}/") for name in PURE)


def impure(module: str, source: str) -> set[str]:
    """What a pure module imports and may not."""
    allowed = PURE_IMPORTS | EXCEPTIONS.get(module, set()) | EXCEPTIONS.get(unit(module), set())
    return {name.split(".")[0] for name in imports(source)} - allowed


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_knows_imports_only_downward_and_is_one_concept_long(
    module: str,
) -> None:
    source = source_of(module)
    assert ast.get_docstring(ast.parse(source)), "a module opens with what it knows"
    assert upward(module, source) == set()
    assert len(source.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", [module for module in MODULES if is_pure(module)])
def test_a_pure_module_imports_nothing_that_acts_on_the_world(module: str) -> None:
    assert impure(module, source_of(module)) == set()


def test_only_one_folder_imports_ray() -> None:
    importing = {
        module
        for module in MODULES
        if "ray" in {name.split(".")[0] for name in imports(source_of(module))}
    }
    assert importing
    assert all(module.startswith(RAY_FOLDER) for module in importing)


def test_other_folders_import_messages_from_one_module() -> None:
    apart = {"protocol/pushes", "protocol/shard_status"}  # which `protocol/messages` hands on
    importing = {module for module in MODULES if ours(source_of(module)) & apart}
    assert importing == {module for module in importing if unit(module) == "protocol"} != set()


def test_no_folder_has_a_circle_of_imports_inside() -> None:
    graph = {
        module: {other for other in ours(source_of(module)) if other != module}
        for module in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_step_in_local_mode_passes_few_functions(num_shards: int) -> None:
    passed = trace_step(num_shards).functions
    assert ("worker.py", "Worker.step") in passed and (
        "runtime/alone_ahead.py",
        "AloneAhead.take",
    ) in passed
    assert len(passed) <= MOST_FUNCTIONS, sorted(passed)


def test_ray_remote_is_said_in_one_module() -> None:
    assert [module for module in MODULES if "ray.remote(" in source_of(module)] == [
        "backends/ray/actors"
    ]


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    assert {unit(module) for module in MODULES} == LEVELS.keys()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("shard/machine", "import distnadam.optimizer", {"optimizer"}),
        ("config", "def f():\n    from distnadam.nadam import kernels", {"nadam/kernels"}),
        ("worker", "from distnadam import training", {"training/__init__"}),
        ("transport/unix_connection", "from distnadam.shard.phases import Phase", {"shard/phases"}),
        ("cli/group", "from distnadam.optimizer import DistNadam", set()),
        ("shard/machine", "from distnadam.shard.round import Round", set()),
    ],
)
def test_the_check_refuses_an_import_that_does_not_go_down(
    module: str, source: str, wrong: set[str]
) -> None:
    assert upward(module, source) == wrong


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("shard/machine", "import threading", {"threading"}),
        ("nadam/stepper", "from concurrent.futures import ThreadPoolExecutor", set()),
        ("nadam/norms", "import numba", {"numba"}),
        ("protocol/messages", "import msgpack", {"msgpack"}),
    ],
)
def test_the_check_refuses_what_acts_on_the_world(
    module: str, source: str, wrong: set[str]
) -> None:
    assert impure(module, source) == wrong
