"""What a user of `distnadam train` on Ray sees of workers in other processes, and does from another
shell.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distnadam import fit
from distnadam.cli.task_names import load_task
from distnadam.errors import ClusterError, VersionMismatch
from tests.cli.test_cli import start

TASK = """
import os, pathlib, signal, sys, time, warnings
import numpy as np
from beside import doubled
HERE = pathlib.Path(__file__).parent

class T:
    def init(self, seed):
        return {"w": np.ones(5, np.float32)}

    def batch(self, step, rank, world_size):
        if step == 1:
            print("printed by rank", rank)
            warnings.warn(f"warned of by rank {rank}")
        if (step, rank) == (3, 1) and not (HERE / "struck").exists():
            (HERE / "struck").touch()
            print("the last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        while step == 5 and not (HERE / "go").exists():
            time.sleep(0.01)
        return rank

    def loss_and_gradients(self, params, batch):
        return 1.0, doubled(params)

    def evaluate(self, params):
        return {"first": float(params["w"][0])}
"""
BESIDE = "def doubled(params): return {'w': params['w'] * 2}\n"
SHELL = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "t1.py").write_text(TASK)
    (tmp_path / "hide" / "beside.py").write_text(BESIDE)
    how = ["--workers", 2, "--steps", 6, "--name", "seen", "--checkpoint-dir", "run"]
    environment = os.environ.copy()
    for key in [key for key in environment if key.startswith("RAY_AUTH")]:
        del environment[key]
    process = start("train", "hide/t1.py:T", *how, cwd=tmp_path, env=environment)
    with process:
        yield process
        process.kill()


@pytest.mark.nightly
def test_a_file_trains_is_seen_and_is_reached_by_the_command_that_it_prints(
    training: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert training.stderr is not None
    seen: list[str] = []
    for line in training.stderr:
        seen.append(line)
        if "it is started again" in line:
            break
    said = "".join(seen)
    command = re.search(r"from another shell: (.*) \(or save, reshard, stop", said)
    assert command is not None, said
    shell = command[1].replace("distnadam ", f"{sys.executable} -m distnadam ")
    for what in ("status seen", "save seen"):
        done = subprocess.run(
            shell.replace("status seen", what) + (" by-hand" if "save" in what else ""),
            shell=True,
            env=SHELL,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert list((tmp_path / "by-hand").glob("step_*"))
    (tmp_path / "hide" / "go").touch()
    out, rest = training.communicate()
    said += rest
    assert training.returncode == 0, said
    assert "first" in out
    for rank in (0, 1):
        assert re.search(rf"^worker {rank} on [\d.]+: printed by rank {rank}$", said, re.M), said
        assert re.search(rf"^worker {rank} on [\d.]+: .*warned of by rank {rank}$", said, re.M)
    assert re.search(r"^worker 1 on [\d.]+: the last words$", said, re.M), said
    died = re.findall(
        r"^worker 1, step 3: its process or node died \(pid (\d+) on [\d.]+\); Ray's report is in "
        r"(.*); it is started again$",
        said,
        re.M,
    )
    assert len(died) == 1, said
    assert f"PID: {died[0][0]} " in Path(died[0][1]).read_text()
    assert "A worker died or was killed" not in said


@pytest.mark.parametrize(
    ("raised", "error", "remedy"),
    [
        ("ModuleNotFoundError", VersionMismatch, ": install it there, or keep it beside"),
        pytest.param("ZeroDivisionError", ClusterError, "$", marks=pytest.mark.nightly),
    ],
)
def test_what_cannot_be_imported_in_a_worker_ends_the_run_at_once_with_its_cause(
    raised: str, error: type[Exception], remedy: str, ray_cluster: None, tmp_path: Path
) -> None:
    file = tmp_path / f"task_of_{raised.lower()}.py"
    file.write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    raise {raised}('of this file')\n{TASK}"
    )
    (tmp_path / "beside.py").write_text(BESIDE)
    task = load_task(f"{file}:T")
    with pytest.raises(
        error,
        match=rf"(?m)^worker [01] on [\d.]+: what it needs cannot be loaded there: {raised}: of "
        rf"this file{remedy}",
    ) as caught:
        fit(task, steps=3, backend="ray", checkpoint_dir=tmp_path / "run", verbose=False)
    if error is ClusterError:  # what is missing needs no traceback
        assert file.name in "".join(caught.value.__notes__), "the whole traceback"
