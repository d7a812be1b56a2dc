"""What the package shows to the world, and what importing it does not drag in."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import distnadam

NEVER_IMPORTED = (
    "ray",
    "torch",
    "jax",
    "sklearn",
    "matplotlib",
    "numba",
    "llvmlite",
    "keras",
    "tensorflow",
    "tf_keras",
    "optax",
)
NOT_WITH_THE_OPTIMIZER = (
    "distnadam.training",
    "distnadam.interop",
    "distnadam.cli",
    "rich",
    "click",
    "fsspec",
    "multiprocessing",
)
NOT_IN_A_SHARD = (
    "distnadam.optimizer",
    "distnadam.training",
    "distnadam.interop",
    "rich",
    "fsspec",
    "numba",
    "llvmlite",
    "sklearn",
)
BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""


def run(code: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_sorted_there_and_described() -> None:
    assert distnadam.__all__ == [
        "DistAdam",
        "DistAdamW",
        "DistNadam",
        "DistNadamW",
        "Group",
        "LossScale",
        "Options",
        "Task",
        "Worker",
        "fit",
    ]
    assert all(getattr(distnadam, name).__doc__ for name in distnadam.__all__)


def test_the_namespace_holds_the_public_names_and_submodules_only() -> None:
    for name in distnadam.__all__:
        getattr(distnadam, name)  # is in the namespace from its first use on
    own = {
        name
        for name, value in vars(distnadam).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert own - {"TYPE_CHECKING", "Any", "import_module"} == set(distnadam.__all__)


def test_no_public_name_imports_ray_or_a_framework(tmp_path: Path) -> None:
    run(
        f"from distnadam import *; import sys; assert DistNadam and fit; "
        f"assert not set({NEVER_IMPORTED!r}) & set(sys.modules)",
        tmp_path,
    )


def test_importing_the_package_imports_no_module_of_it_and_not_numpy(tmp_path: Path) -> None:
    run(
        "import sys, distnadam; found = set(sys.modules) - {'distnadam'}; "
        "assert not [name for name in found if name.split('.')[0] in ('distnadam', 'numpy')]",
        tmp_path,
    )


def test_what_the_optimizer_imports_has_no_training_loop_and_no_command_line(
    tmp_path: Path,
) -> None:
    run(
        "from distnadam import DistNadam; import sys; "
        f"assert not set({NOT_WITH_THE_OPTIMIZER!r}) & set(sys.modules)",
        tmp_path,
    )


def test_what_a_shard_imports_has_no_training_loop_and_no_command_line(tmp_path: Path) -> None:
    run(
        "import distnadam.backends.ray.actors, sys; "
        f"assert not set({NOT_IN_A_SHARD!r}) & set(sys.modules)",
        tmp_path,
    )


def test_public_modules_are_there_after_importing_the_package(tmp_path: Path) -> None:
    run(
        "import distnadam; assert distnadam.schedules.Constant and distnadam.errors.ConfigError "
        "and distnadam.metrics.METRICS and distnadam.training",
        tmp_path,
    )


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert set(distnadam.__all__) <= set(dir(distnadam))
    with pytest.raises(AttributeError, match="module 'distnadam' has no attribute 'Nadam'"):
        getattr(distnadam, "Nad" + "am")


def test_local_mode_trains_with_the_import_of_ray_and_frameworks_blocked(tmp_path: Path) -> None:
    work = """
    import numpy as np
    from distnadam import DistNadam
    built = DistNadam(num_shards=2, num_workers=2, backend="auto")
    with built.build({"w": np.ones(9, np.float32)}) as optimizer:
        assert optimizer.backend_name == "local"
        tickets = [optimizer.worker(rank).push({"w": np.ones(9, np.float32)}) for rank in range(2)]
        assert [t.result() for t in tickets] == [1, 1]
        optimizer.save("here")
    with DistNadam.restore("here") as optimizer:
        assert optimizer.iterations == 1
    """
    run(BLOCKER.format(names=set(NEVER_IMPORTED)) + textwrap.dedent(work), tmp_path)
