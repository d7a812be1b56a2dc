"""No file of ours is unpickled or run: by the sources, and with files that would run code."""

import ast
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam
from distnadam.checkpoint import store
from distnadam.errors import CheckpointError
from distnadam.nadam.object_code import code_dirs
from tests.cli.test_cli import call
from tests.test_architecture import MODULES, PACKAGE, source_of

UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__", "importlib.import_module"}
LOADERS = (
    *("ExecutionLoader", "SourceLoader", "FileLoader", "InspectLoader", "zipimporter"),
    *("exec_module", "module_from_spec", "spec_from_file_location", "run_path"),
)
ALLOWED = {
    "cli/task_names": ["calls importlib.import_module"],  # of a task that was named
    "copies": ["imports pickle"],  # unpickles what it has pickled itself, in memory
    # what a worker gets through Ray, with the task
    "training/task_code": [
        "loads by ExecutionLoader",
        "loads by importlib.util.spec_from_file_location",
    ],
}


def trespasses(source: str) -> list[str]:
    """Return what a source does that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        used = [node.func] if isinstance(node, ast.Call) else getattr(node, "bases", [])
        found += [f"loads by {name}" for name in map(ast.unparse, used) if name.endswith(LOADERS)]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        how = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in RUNNERS:
            found.append(f"calls {called}")
        if how.get("allow_pickle", "False") != "False" or (
            called in ("np.load", "numpy.load") and "allow_pickle" not in how
        ):
            found.append(f"{called} may unpickle")
        if called == "torch.load" and how.get("weights_only") != "True":
            found.append("torch.load may unpickle")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_source_of_ours_can_make_code_of_a_file(module: str) -> None:
    assert trespasses(source_of(module)) == ALLOWED.get(module, [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "read_array(file, allow_pickle=maybe)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "importlib.import_module(name)",
        "importlib.machinery.SourceFileLoader(name, path).load_module()",
        "class Mine(importlib.abc.SourceLoader):\n    pass",
        "runpy.run_path(path)",
    ],
)
def test_the_check_of_the_sources_finds_what_could(source: str) -> None:
    assert trespasses(source)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """A directory that exists after a bomb went off, as the fixture itself checks."""
    one = tmp_path / "it went off"
    pickle.loads(pickle.dumps(Bomb(one)))
    assert one.exists()
    one.rmdir()
    return one


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with DistNadam(num_shards=2, backend="local").build(
        {"w": np.ones(5000, np.float32)}
    ) as optimizer:
        return Path(optimizer.save(tmp_path / "run"))


@pytest.mark.parametrize("victim", [store.MANIFEST, "shard-00000-of-00002-*"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_in_place_of_a_checkpoints_file_is_refused_and_runs_nothing(
    victim: str, protocol: int, saved: Path, witness: Path
) -> None:
    next(saved.glob(victim)).write_bytes(pickle.dumps(Bomb(witness), protocol))
    for command in (
        ["verify", saved],
        ["inspect", saved],
        ["diff", saved, saved],
        ["export", saved, saved.parent / "o.npz", "--to", "numpy"],
    ):
        assert call(*command).exit_code == 1, command
    with pytest.raises(CheckpointError):
        DistNadam.restore(saved, backend="local")
    assert not witness.exists()


@pytest.mark.parametrize("kind", ["numpy", "keras", "safetensors", "torch"])
def test_a_pickle_that_is_to_be_imported_is_refused_and_runs_nothing(
    kind: str, tmp_path: Path, witness: Path
) -> None:
    if kind == "torch" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    bare, zipped = tmp_path / "bare", tmp_path / "zipped.npz"
    bare.write_bytes(pickle.dumps(Bomb(witness)))
    np.savez(zipped, w=np.array([Bomb(witness)], object))
    for file in (bare, zipped):
        done = call("import", file, tmp_path / "out", "--from", kind)
        assert done.exit_code == 1, done.output
        assert file.name in done.output
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


UNPICKLED = """
import pickle, sys
from pathlib import Path
import distnadam
from distnadam import DistNadam
from distnadam.cli import main
seen = []
sys.addaudithook(lambda event, args: seen.append(args) if event == "pickle.find_class" else None)
options = distnadam.Options(kernel="numpy")
path = DistNadam.restore(sys.argv[1], backend="local", options=options).save(sys.argv[2])
main(["verify", path], standalone_mode=False)
assert seen == [], seen
pickle.loads(pickle.dumps(Path("x")))
assert seen, "the hook sees nothing"
"""


def test_saving_and_restoring_looks_up_no_class_of_a_pickle(saved: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLED, str(saved), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_compiled_code_lies_beside_the_package_or_in_the_users_own_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DISTNADAM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    beside, own = code_dirs(PACKAGE / "nadam" / "fused_loop.py")
    assert beside == PACKAGE / "nadam" / "__pycache__"
    assert own.is_relative_to(Path.home())


HOMELESS = """
import os, sys
from pathlib import Path
from distnadam.nadam.object_code import code_dirs
os.setuid(54321)
print(len(code_dirs(Path("/package/loop.py"))))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user that does not exist")
def test_a_user_without_a_home_has_no_directory_for_compiled_code() -> None:
    without = ("HOME", "XDG_CACHE_HOME", "DISTNADAM_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
