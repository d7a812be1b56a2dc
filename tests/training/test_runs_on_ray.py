"""Whole runs of the command on a Ray of its own: killed and resumed, and stopped by Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from distnadam.training.metrics_file import read_metrics
from tests.cli.test_cli import TRAIN, call, files, start, wait_for
from tests.processes import children, wait_until_gone

ON_RAY = [
    "train",
    "digits",
    "--workers",
    "2",
    "--shards",
    "2",
    "--steps",
    "150",
    "--save-every",
    "20",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def no_settings_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def end_by_themselves() -> Iterator[set[int]]:
    """Processes that must have ended once the module's other tests have: Ray notices a killed
    driver after a minute.
    """
    processes: set[int] = set()
    yield processes
    wait_until_gone(processes)


def test_a_run_killed_half_way_and_resumed_ends_with_the_bits_of_a_local_one(
    tmp_path: Path, end_by_themselves: set[int]
) -> None:
    whole = call(*TRAIN, "--steps", 150, "--save-every", 20, "--checkpoint-dir", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    process = start(*ON_RAY, "--checkpoint-dir", tmp_path / "killed", cwd=tmp_path)
    wait_for(tmp_path / "killed", "step_00000060/manifest.msgpack", process)
    end_by_themselves |= children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = subprocess.run(
        [sys.executable, "-m", "distnadam", *ON_RAY, "--checkpoint-dir", tmp_path / "killed"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed" / "metrics.csv") == read_metrics(
        tmp_path / "whole" / "metrics.csv"
    )


def test_ctrl_c_saves_reports_it_and_leaves_no_process(tmp_path: Path) -> None:
    process = start(*ON_RAY, "--steps", 10**6, "--checkpoint-dir", tmp_path, cwd=tmp_path)
    wait_for(tmp_path, "step_*/manifest.msgpack", process)
    below = children(process.pid)
    assert len(below) > 5
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to Ray's processes too
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "saved step" in stderr
    assert "Traceback" not in stderr
    assert call("verify", tmp_path).exit_code == 0
    wait_until_gone(below)


EVALUATES_LONG = """
import os, time
import numpy as np
class Long:
    def init(self, seed): return {"w": np.full(2, 5, np.float32)}
    def batch(self, step, rank, world_size): return step
    def loss_and_gradients(self, params, batch): return 1.0, {"w": 2 * params["w"]}
    def evaluate(self, params):
        if not os.path.exists("slept"):
            open("slept", "w").close()
            time.sleep(600)
        return {"first": params["w"][0]}
"""


@pytest.mark.nightly
def test_a_head_that_dies_during_a_long_evaluation_is_noticed_before_ray_ends_the_process(
    tmp_path: Path,
) -> None:
    (tmp_path / "long.py").write_text(EVALUATES_LONG)
    how = ["--steps", 40, "--save-every", 10, "--evaluate-every", 20, "--checkpoint-dir", "run"]
    process = start("train", "long.py:Long", *how, cwd=tmp_path)
    wait_for(tmp_path, "slept", process)
    kill_below(process.pid, "gcs_server")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "Ray itself died: its head at" in stderr
    assert "the run goes on from there in a new Ray" in stderr


@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_ray_that_is_killed_while_it_starts_is_begun_anew(tmp_path: Path, victim: str) -> None:
    process = start("train", "digits", "--steps", 4, "--checkpoint-dir", "run", cwd=tmp_path)
    while process.poll() is None:
        with suppress(AssertionError, OSError):
            kill_below(process.pid, victim)
            break
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert f"Ray itself died: its {victim} (process " in stderr
    assert "was killed while it started" in stderr
    assert "in a new Ray" in stderr


def kill_below(above: int, name: str) -> None:
    """Kill the process of that program below another."""
    for pid in children(above):
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        if program.endswith(f"/{name}"):
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError(f"there is no {name}")


HEAD = """
import os, ray
context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
os.read(0, 1)
"""


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[str]"]:
    """The process of another Ray, which commands join, and of whose head they are soon tired."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", HEAD], text=True, **pipes) as process:  # type: ignore[call-overload]
        monkeypatch.setenv("RAY_ADDRESS", process.stdout.readline().strip())
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
        yield process
        process.kill()


def ended_by_its_ray(process: "subprocess.Popen[str]") -> str:
    """Wait until a command ends that says how to go on; return what it has said."""
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == os.EX_TEMPFAIL, stderr
    for words in ("distnadam: Ray itself died", "is saved in", "to go on: distnadam train "):
        assert words in stderr
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize(
    "victim", [pytest.param("raylet", marks=pytest.mark.nightly), "gcs_server"]
)
def test_where_the_ray_of_others_dies_the_status_is_75_and_the_command_goes_on(
    tmp_path: Path, head: "subprocess.Popen[str]", victim: str
) -> None:
    process = start(*ON_RAY, "--steps", 10**6, "--checkpoint-dir", tmp_path / "run", cwd=tmp_path)
    wait_for(tmp_path / "run", "step_*/manifest.msgpack", process)
    kill_below(head.pid, victim)
    ended_by_its_ray(process)


@pytest.mark.nightly
def test_it_is_75_too_where_the_run_calls_no_ray_as_its_head_dies(
    tmp_path: Path, head: "subprocess.Popen[str]"
) -> None:
    """Ray itself would end the process with 1."""
    (tmp_path / "long.py").write_text(EVALUATES_LONG)
    how = ["--steps", 40, "--save-every", 10, "--evaluate-every", 20, "--checkpoint-dir", "run"]
    process = start("train", "long.py:Long", *how, cwd=tmp_path)
    wait_for(tmp_path, "slept", process)
    kill_below(head.pid, "gcs_server")
    assert re.search("step (10|20) is saved in .*run", ended_by_its_ray(process))
