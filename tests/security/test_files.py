"""Files: their permissions and places; no name from outside leads out of its directory."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distnadam import DistNadam, fit
from distnadam.errors import ConfigError
from tests.cli.test_cli import call
from tests.security.strangers import as_nobody, as_root
from tests.training.test_fit import Quadratic

GRADIENTS = {"w": np.ones(5000, np.float32)}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(root: Path) -> set[tuple[str, int]]:
    return {
        ("directory" if p.is_dir() else "file", stat.S_IMODE(p.stat().st_mode))
        for p in (root, *root.rglob("*"))
    }


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("mask", "file", "directory"),
    [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755), (0o027, 0o640, 0o750)],
)
def test_a_runs_files_have_the_permissions_of_its_umask(
    mask: int, file: int, directory: int, tmp_path: Path
) -> None:
    with umask(mask):
        fit(Quadratic(), steps=3, backend="local", checkpoint_dir=tmp_path / "run", verbose=False)
        assert (
            call(
                "export", tmp_path / "run", tmp_path / "run" / "out.npz", "--to", "numpy"
            ).exit_code
            == 0
        )
    assert modes(tmp_path / "run") == {("file", file), ("directory", directory)}


@as_root
def test_another_user_cannot_read_a_run_of_umask_077(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    with umask(0o077):
        fit(Quadratic(), steps=3, backend="local", checkpoint_dir=tmp_path / "run", verbose=False)
    code = (
        "for path in sys.argv[1:]:\n    try: print(open(path, 'rb').read(1))\n    except "
        "PermissionError: print('refused')"
    )
    inside = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert as_nobody("import sys", code, *inside).split() == ["refused"] * len(inside)


OWN = """
import os, sys
import numpy as np
from distnadam import DistNadam
with DistNadam(num_shards=2, backend="ray").build({"w": np.ones(3, np.float32)}) as optimizer:
    optimizer.apply_gradients({"w": np.ones(3, np.float32)})
    import ray
    print(ray.get_runtime_context().get_session_name(), flush=True)
    input()
"""


@as_root
@pytest.mark.slow
@pytest.mark.parametrize("private", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_rays_own_directory_is_open_to_other_users_unless_it_lies_in_a_private_one(
    private: bool, tmp_path: Path
) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")} | {
        "HOME": str(tmp_path)
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as directory:  # 0700, and short enough for a socket's path
        os.chmod(directory, 0o700 if private else 0o755)
        env["RAY_TMPDIR"] = directory
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", OWN], env=env, **pipes
        ) as process:
            assert process.stdout is not None and process.stdin is not None
            session = Path(directory) / "ray" / process.stdout.readline().strip()
            code = (
                "for path in sys.argv[1:]:\n    print('refused' if not os.access(path, "
                "os.R_OK | os.W_OK) else 'open')"
            )
            answers = as_nobody("import sys", code, session, session / "logs", session / "sockets")
            assert answers.split() == ["refused" if private else "open"] * 3
            process.communicate("\n")
    assert process.returncode == 0


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "/abs", ".", "..", ".hidden", "-rf", "a\0b", "a\nb", "a b", "ü", "x" * 64, 7],
)
def test_a_name_that_could_be_a_path_is_no_name(name: Any) -> None:
    with pytest.raises(
        ConfigError, match="name must be up to 63 letters, digits, dots, dashes or underscores"
    ):
        DistNadam(name=name)


def test_tasks_and_tensors_named_like_paths_write_only_where_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Outward(Quadratic):
        name = "../../../outward/\0task"

        def init(self, seed: int) -> Any:
            return {"../../../w": super().init(seed), "/tmp/v": np.ones(3, np.float32)}

        def loss_and_gradients(self, params: Any, batch: Any) -> Any:
            loss, gradients = super().loss_and_gradients(params["../../../w"], batch)
            return loss, {"../../../w": gradients, "/tmp/v": np.ones(3, np.float32)}

        def evaluate(self, params: Any) -> dict[str, float]:
            return {}

    here = tmp_path / "a" / "b" / "c" / "d"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    history = fit(Outward(), steps=2, backend="local", verbose=False)
    for kind in ("safetensors", "numpy", "keras"):
        assert (
            call("export", history.checkpoint_dir, here / f"{kind}.out", "--to", kind).exit_code
            == 0
        )
        assert (
            call("import", here / f"{kind}.out", here / f"{kind}.back", "--from", kind).exit_code
            == 0
        )
    assert history.checkpoint_dir.parent == here / "runs"
    assert everything(tmp_path) - {f"a/b/c/d/{name}" for name in everything(here)} == {
        "a",
        "a/b",
        "a/b/c",
        "a/b/c/d",
    }


def test_a_link_under_a_checkpoints_future_file_name_is_not_written_through(
    tmp_path: Path,
) -> None:
    (tmp_path / "step_00000001").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "step_00000001" / "manifest.msgpack").symlink_to(precious)
    with DistNadam(backend="local").build(GRADIENTS) as optimizer:
        optimizer.apply_gradients(GRADIENTS)
        saved = Path(optimizer.save(tmp_path))
    assert precious.read_text() == "mine"
    assert not (saved / "manifest.msgpack").is_symlink()
    assert call("verify", saved).exit_code == 0


def test_write_access_to_a_checkpoint_is_write_access_to_the_model(tmp_path: Path) -> None:
    saved = {}
    for who, value in (("ours", 1), ("theirs", 2)):
        with DistNadam(backend="local").build({"w": np.full(5000, value, np.float32)}) as optimizer:
            saved[who] = Path(optimizer.save(tmp_path / who))
    for file in saved["ours"].iterdir():
        file.unlink()
    for file in saved["theirs"].iterdir():
        file.rename(saved["ours"] / file.name)
    assert call("verify", tmp_path / "ours").exit_code == 0, "every checksum is right"
    with DistNadam.restore(tmp_path / "ours", backend="local") as optimizer:
        assert set(optimizer.get_params()["w"]) == {2.0}
