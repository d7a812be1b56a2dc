"""The command line, as a shell runs it: its output, exit codes, a real SIGKILL and Ctrl-C."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distnadam import DistNadam, Group
from distnadam.checkpoint import store
from distnadam.cli import main
from distnadam.cli.group import plain_console
from distnadam.cli.running import render
from distnadam.client.status import ShardStatus, Status
from distnadam.extras import how_to_install
from distnadam.schedules import Polynomial
from distnadam.training.metrics_file import read_metrics
from tests.test_exports import BLOCKER

TRAIN = ["train", "digits", "--local", "--json", "--quiet"]


def call(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def start(*args: Any, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distnadam", *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Wait until a file of that pattern appears; the test's own timeout bounds it."""
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)


def files(path: Path) -> dict[str, bytes]:
    """Return the shard files of the newest checkpoint, by the beginnings of their names."""
    newest = max(path.glob("step_*"))
    return {p.name[:20]: p.read_bytes() for p in newest.glob("shard-*")}


def test_training_ends_with_a_summary(tmp_path: Path) -> None:
    done = call(
        "train", "digits", "--local", "--quiet", "--steps", 30, "--checkpoint-dir", tmp_path
    )
    assert done.exit_code == 0, done.output
    for word in (
        "accuracy",
        "step_00000030",
        "loss.png",
        "metrics.csv",
        "the steps alone",
    ):
        assert word in done.output
    assert "distnadam train" not in done.output, "there is nothing to resume"


def test_the_command_to_resume_repeats_what_was_asked_for(tmp_path: Path) -> None:
    labels = [
        "--shard-label",
        "role=shards",
        "--shard-label",
        "zone=in(a,b)",
        "--worker-label",
        "role=workers",
    ]
    asked = [*labels, "--worker-cpus", 1, "--lr", 0.01, "--port-range", 7000, 7063]
    place = "file://" + str(tmp_path / "run")
    task = f"{interrupted_task(tmp_path)}:Interrupted"
    done = call("train", task, *TRAIN[2:], "--steps", 5, "--checkpoint-dir", place, *asked)
    assert done.exit_code == 130, done.output
    resume = done.stderr.splitlines()[-1].removeprefix("distnadam: to go on: ")
    for words in (
        "--shard-label role=shards --shard-label 'zone=in(a,b)' --worker-label role=workers",
        "--worker-cpus 1.0",
        "--lr 0.01",
        "--port-range 7000 7063",
    ):
        assert words in resume
    assert f"--checkpoint-dir {place}" in resume
    assert "--shard-cpus" not in resume
    again = call(*shlex.split(resume)[1:], "--json", "--quiet")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["checkpoint"].endswith("step_00000005")


def interrupted_task(directory: Path) -> Path:
    """Write a task that gets a Ctrl-C at its first step of its first run."""
    path = directory / "interrupted_task.py"
    path.write_text(
        "import pathlib, signal\nimport numpy as np\n"
        "class Interrupted:\n"
        "    def init(self, seed): return [np.ones(3, np.float32)]\n"
        "    def batch(self, step, rank, world_size):\n"
        "        once = pathlib.Path(__file__).with_suffix('.once')\n"
        "        if rank == 0 and not once.exists():\n"
        "            once.touch()\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "    def loss_and_gradients(self, params, batch): return 1.0, [params[0]]\n"
        "    def evaluate(self, params): return {}\n"
    )
    return path


def test_a_learning_rate_that_is_not_given_stays_that_of_the_run(tmp_path: Path) -> None:
    how = ["--checkpoint-dir", tmp_path]
    assert call(*TRAIN, *how, "--steps", 2, "--lr", 0.01).exit_code == 0
    assert call(*TRAIN, *how, "--steps", 3).exit_code == 0
    assert store.load(tmp_path / "step_00000003").config["lr"] == 0.01
    changed = call(*[word for word in TRAIN if word != "--quiet"], *how, "--steps", 4, "--lr", 1e-3)
    assert "the learning rate is 0.001 from here on, as given" in changed.stderr
    assert store.load(tmp_path / "step_00000004").config["lr"] == 1e-3


def test_a_label_that_is_none_is_refused() -> None:
    done = call(*TRAIN, "--shard-label", "shards")
    assert done.exit_code == 2
    assert "'shards' is not KEY=VALUE" in done.output


def test_local_training_never_imports_ray(tmp_path: Path) -> None:
    code = (
        BLOCKER.format(names={"ray"})
        + f"from distnadam.cli import main\nmain({[*TRAIN, '--steps', '5']!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"].endswith("step_00000005")


def test_a_run_ends_well_where_matplotlib_refuses_to_be_imported(tmp_path: Path) -> None:
    # as in a notebook, whose backend this environment may not have
    environment = {**os.environ, "MPLBACKEND": "of another environment"}
    process = start(*TRAIN, "--steps", 5, cwd=tmp_path, env=environment)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert json.loads(output)["plot"] is None


def test_a_run_killed_half_way_and_resumed_ends_with_the_undisturbed_bits(tmp_path: Path) -> None:
    how = ["--steps", 300, "--save-every", 25]
    assert call(*TRAIN, *how, "--checkpoint-dir", tmp_path / "whole").exit_code == 0
    process = start(*TRAIN, *how, "--checkpoint-dir", tmp_path / "killed", cwd=tmp_path)
    wait_for(tmp_path / "killed", "step_*/manifest.msgpack", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = call(*TRAIN, *how, "--checkpoint-dir", tmp_path / "killed")
    assert resumed.exit_code == 0, resumed.output
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed" / "metrics.csv") == read_metrics(
        tmp_path / "whole" / "metrics.csv"
    )


def test_ctrl_c_saves_reports_it_and_leaves_nothing(tmp_path: Path) -> None:
    process = start(
        "train",
        "digits",
        "--local",
        "--steps",
        10**6,
        "--save-every",
        50,
        "--checkpoint-dir",
        tmp_path,
        cwd=tmp_path,
    )
    wait_for(tmp_path, "step_*/manifest.msgpack", process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved step" in stderr
    assert "Traceback" not in stderr
    assert call("verify", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nothing", "no task named"),
        ("no.such:Thing", "cannot import"),
        ("json:loads", "expected a class or object"),
        ("gone.py:T", "no such file"),
    ],
)
def test_a_task_that_is_none_is_wrong_usage(task: str, message: str) -> None:
    done = call("train", task, "--local")
    assert done.exit_code == 2
    assert message in done.output


def test_a_task_of_ones_own_is_found_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(
        "import numpy as np\n"
        "class Own:\n"
        "    def init(self, seed): return [np.ones(3, np.float32)]\n"
        "    def batch(self, step, rank, world_size): return rank\n"
        "    def loss_and_gradients(self, params, batch): return 1.0, [params[0] * (batch + 1)]\n"
        "    def evaluate(self, params):\n"
        "        print('said by the task')\n"
        "        return {'first': float(params[0][0])}\n"
    )
    done = call(
        "train",
        f"{tmp_path / 'own_task.py'}:Own",
        "--local",
        "--json",
        "--quiet",
        "--steps",
        3,
        "--checkpoint-dir",
        tmp_path / "run",
    )
    assert done.exit_code == 0, done.output
    assert "said by the task" in done.stderr
    assert json.loads(done.stdout)["first"] < 1


def test_a_failing_task_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "bad_task.py").write_text(
        "import numpy as np\n"
        "class Bad:\n"
        "    def init(self, seed): return [np.ones(3, np.float32)]\n"
        "    def batch(self, step, rank, world_size): return None\n"
        "    def loss_and_gradients(self, params, batch): return 1.0, [np.ones(4)]\n"
        "    def evaluate(self, params): return {}\n"
    )
    done = call(
        "train",
        f"{tmp_path / 'bad_task.py'}:Bad",
        "--local",
        "--quiet",
        "--checkpoint-dir",
        tmp_path / "run",
    )
    assert done.exit_code == 1
    assert "'0': expected shape (3,)" in done.output


def test_inspect_verify_and_plot_read_a_run(tmp_path: Path) -> None:
    assert (
        call(*TRAIN, "--steps", 20, "--save-every", 10, "--checkpoint-dir", tmp_path).exit_code == 0
    )
    shown = json.loads(call("inspect", tmp_path, "--json").output)
    assert (shown["iterations"], shown["topology"]["num_shards"], len(shown["files"])) == (20, 2, 2)
    assert "0/kernel" in call("inspect", tmp_path / "step_00000010").output
    assert call("plot", tmp_path, "--output", tmp_path / "other.png").exit_code == 0
    assert (tmp_path / "other.png").exists()
    victim = next((tmp_path / "step_00000010").glob("shard-00001-*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    verdicts = call("verify", tmp_path, "--json")
    assert verdicts.exit_code == 1
    assert [v["valid"] for v in json.loads(verdicts.output)] == [False, True]
    assert victim.name in json.loads(verdicts.output)[0]["reason"]
    assert call("inspect", tmp_path / "nothing").exit_code == 1


def test_inspect_shows_arrays_in_data_by_type_and_shape(tmp_path: Path) -> None:
    with DistNadam(backend="local").build({"w": np.ones(3, np.float32)}) as optimizer:
        data = {"mean": np.ones((16, 2), np.float32), "words": ["kept"]}
        optimizer.save(tmp_path, data={"task_state": data})
    output = " ".join(call("inspect", tmp_path).output.split())
    assert "'mean': 'f4 (16, 2)'" in output, output
    assert "kept" in output
    assert "$array" not in output


def test_inspect_tells_everything_and_the_state_of_each_files_checksums(tmp_path: Path) -> None:
    assert call(*TRAIN, "--steps", 5, "--checkpoint-dir", tmp_path).exit_code == 0
    shown = json.loads(call("inspect", tmp_path, "--json").output)
    assert shown["checksums"] == "verified"
    assert [f["checksums"] for f in shown["files"]] == ["verified", "verified"]
    assert {"lr", "epsilon", "schedule_decay"} <= shown["config"].keys()
    tensors = {t["path"]: t for t in shown["tensors"]}
    assert (tensors["0/kernel"]["dtype"], len(tensors["0/kernel"]["shape"])) == ("float32", 2)
    assert (
        shown["sizes"]["state_bytes"]
        == 12 * shown["sizes"]["elements"]
        < shown["sizes"]["file_bytes"]
    )
    assert shown["sizes"]["file_bytes"] == sum(f["bytes"] for f in shown["files"])
    assert (
        json.loads(call("inspect", tmp_path, "--json", "--no-read").output)["checksums"]
        == "not read"
    )
    output = call("inspect", tmp_path).output
    for word in (
        "config.lr",
        "0.002",
        "schedule_decay",
        "0/kernel",
        "float32[0:",
        "1 verified",
        "of state",
    ):
        assert word in output
    step = tmp_path / "step_00000005"
    victim = next(step.glob("shard-00001-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    done = call("inspect", step)
    assert done.exit_code == 1
    assert f"{victim.name}: bytes [" in done.output
    victim.unlink()
    done = call("inspect", step, "--json", "--no-read")
    assert done.exit_code == 0
    assert "is missing" in json.loads(done.output)["files"][1]["checksums"]


def test_diff_says_what_differs_and_exits_1(tmp_path: Path) -> None:
    assert (
        call(
            *TRAIN, "--steps", 20, "--save-every", 10, "--checkpoint-dir", tmp_path / "a"
        ).exit_code
        == 0
    )
    assert (
        call(*TRAIN, "--steps", 10, "--shards", 3, "--checkpoint-dir", tmp_path / "b").exit_code
        == 0
    )
    early, late = tmp_path / "a" / "step_00000010", tmp_path / "a" / "step_00000020"
    same = call("diff", early, tmp_path / "b")
    assert same.exit_code == 0, same.output
    assert "the same" in same.output
    done = call("diff", early, late)
    assert done.exit_code == 1
    for word in (
        "iterations: 10 in the first, 20 in the second",
        "0/kernel",
        "max ulp",
        "first index",
    ):
        assert word in done.output
    found = json.loads(call("diff", early, late, "--json").output)
    assert (found["same"], found["settings"]["iterations"]) == (False, [10, 20])
    assert found["tensors"][0].keys() >= {"path", "array", "max_abs", "max_ulp", "first_index"}
    assert call("diff", early, tmp_path / "nothing").exit_code == 1


def test_export_and_import_go_there_and_back(tmp_path: Path) -> None:
    assert call(*TRAIN, "--steps", 5, "--checkpoint-dir", tmp_path / "a").exit_code == 0
    file, back = tmp_path / "keras.npz", tmp_path / "back"
    done = call("export", tmp_path / "a", file, "--to", "keras", "--json")
    assert json.loads(done.output) == {"path": str(file), "notes": []}
    done = call("import", file, back, "--from", "keras", "--config", '{"lr": 0.5}')
    assert done.output.strip() == str(back / "step_00000005")
    assert call("verify", back).exit_code == 0
    done = call("diff", tmp_path / "a", back)
    assert "config.lr: 0.002 in the first, 0.5 in the second" in done.output
    assert "tensors" not in done.output
    refused = call("export", tmp_path / "a", tmp_path / "o.npz", "--to", "optax")
    assert refused.exit_code == 1
    assert "momentum schedule: schedule_decay is 0.004 here" in refused.output
    lossy = call("export", tmp_path / "a", tmp_path / "o.npz", "--to", "optax", "--lossy")
    assert lossy.exit_code == 0
    assert "differs: momentum schedule" in lossy.output
    assert (
        call(
            "export",
            tmp_path / "a",
            tmp_path / "p.safetensors",
            "--to",
            "safetensors",
            "--parameters-only",
        ).exit_code
        == 0
    )
    wrong = call("import", tmp_path / "p.safetensors", tmp_path / "c", "--from", "numpy")
    assert wrong.exit_code == 1
    assert "p.safetensors: is no npz file" in wrong.output
    order = call(
        "export", tmp_path / "a", tmp_path / "k.npz", "--to", "keras", "--order", "0/kernel,nothing"
    )
    assert order.exit_code == 1
    assert "not 'nothing'" in order.output
    for config in ("{", "[1]"):
        assert call("import", file, back, "--from", "keras", "--config", config).exit_code == 2
    assert call("export", tmp_path / "a", file, "--to", "caffe").exit_code == 2


def test_doctor_says_what_is_here_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = json.loads(call("doctor", "--json").output)
    assert found["versions"]["numpy"]
    assert found["kernel"].startswith("fused (llvmlite is installed)")
    assert found["transport"].startswith("shared memory between processes of one Ray node")
    with monkeypatch.context() as context:  # llvmlite is there and cannot be used
        context.setitem(sys.modules, "distnadam.nadam.fused_stepper", None)
        found = json.loads(call("doctor", "--json").output)
        assert found["kernel"].startswith("NumPy, in blocks: the fused kernel cannot be compiled")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    done = call("doctor", "--json")
    assert done.exit_code == 1
    assert "RAY_AUTH_MODE is not" in json.loads(done.output)["problems"][-1]


NO_RAY: list[tuple[list[Any], int, str]] = [
    (["--measure"], 1, "distnadam: no Ray runs in this process and RAY_ADDRESS is not set"),
    (["--measure", "host"], 1, "distnadam: no Ray runs in this process and RAY_ADDRESS is not"),
    (["--address", "127.0.0.1:1", "--measure"], 1, "nobody answers at RAY_ADDRESS=127.0.0.1:1"),
    (["host"], 2, "HOST is for --measure"),
    (["--measure", "--port-range", 9, 7], 1, "port_range must be two ports in order"),
]
WITHOUT_RAY = """
from distnadam.backends.ray import session
from tests.cli.test_cli import NO_RAY, call

session._ANSWER_S = 0.1
for args, code, message in NO_RAY:
    done = call("doctor", *args)
    assert (done.exit_code, message in done.stderr) == (code, True), (args, done.stderr)
    assert code == 2 or len(done.stderr.splitlines()) == 1, done.stderr
"""


def test_doctor_says_whether_a_model_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = call("doctor", "--parameters", "1e14")
    assert done.exit_code == 1
    assert "this host has " in done.stderr
    assert (
        "needs 1907348633 MiB: 762939454 MiB for two buffers of the parameters, "
        "762939454 MiB for the state of its shards, "
        "381469727 MiB for the gradients of its workers"
    ) in done.stderr
    assert "needs" not in call("doctor", "--parameters", "1000").stderr
    beside = ("--workers-per-host", 4, "--replicas", 1, "--sum-group", 2, "--dtype", "bfloat16")
    done = call("doctor", "--parameters", "1e14", *beside, "--ema")
    assert done.exit_code == 1
    assert (
        "needs 4959106446 MiB: 381469727 MiB for two buffers of the parameters, "
        "1525878907 MiB for the state of its shards, 1525878907 MiB for the state of standbys, "
        "1525878907 MiB for the gradients of its workers"
    ) in done.stderr
    split = call("doctor", "--parameters", "1000", "--workers-per-host", 4, "--sum-group", 3)
    assert split.exit_code == 1 and "3 does not divide the 4 workers" in split.stderr
    alone = call("doctor", "--replicas", 1)
    assert alone.exit_code == 2 and "goes with --parameters" in alone.stderr


def test_doctor_without_a_ray_to_examine_is_one_sentence() -> None:
    done = subprocess.run(  # tests of this process may share a Ray
        [sys.executable, "-c", WITHOUT_RAY],
        env=os.environ | {"RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


BRACKETS = "[bold]a :smile: [x]"


def test_what_looks_like_markup_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distnadam.cli.doctor.fused_installed", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "[::1]:6379")
    printed = call("doctor").stdout
    assert how_to_install("fused") in printed
    assert "[::1]:6379" in printed
    done = call(
        "train",
        "digits",
        "--local",
        "--steps",
        2,
        "--save-every",
        1,
        "--checkpoint-dir",
        tmp_path / BRACKETS,
    )
    assert done.exit_code == 0, done.stderr
    assert BRACKETS in call("inspect", tmp_path / BRACKETS).stdout
    newest = max((tmp_path / BRACKETS).glob("step_*"))
    assert BRACKETS in call("verify", newest.rename(newest.with_name(BRACKETS))).stdout
    shard = ShardStatus(index=0, node=BRACKETS, state=BRACKETS, standby=BRACKETS)
    seen = Status("x", 1, 1, 0, 0.1, None, (shard,), {0: BRACKETS}, 1, f"s3://{BRACKETS}", 0.0)
    with (console := plain_console()).capture() as captured:
        console.print(render(seen))
    assert captured.get().count(BRACKETS) == 5, "node, state, standby, worker, checkpoint"


@pytest.mark.parametrize("name", ["numpy", "yaml", "json", "distnadam", "__main__", "my-task"])
def test_a_task_file_named_as_a_package_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text("class T: pass")
    done = call("train", f"{path}:T", "--local")
    assert done.exit_code == 2
    assert f"{name!r} cannot be one of yours: rename it" in done.output


def test_inspect_and_diff_show_groups_as_they_are_written(tmp_path: Path) -> None:
    still = Group("enc/**", trainable=False)
    params = {"enc": {"w": np.ones(3, np.float32)}, "head": np.ones(2, np.float32)}
    paths = []
    for number, rate in enumerate((0.5, Polynomial(0.25, 9))):
        groups = [still, Group("head", lr=rate)]
        with DistNadam(groups=groups, backend="local").build(params) as optimizer:
            paths.append(optimizer.save(tmp_path / str(number)))
    shown = call("inspect", paths[0]).stdout
    assert "Group('enc/**', trainable=False)" in shown
    assert re.search(r"enc/w .* enc/\*\*", shown)
    described = json.loads(call("inspect", paths[0], "--json").output)
    assert [t["group"] for t in described["tensors"]] == ["enc/**", "head"]
    done = call("diff", *paths)
    assert done.stdout.startswith(
        "config.groups['head']: Group('head', lr=0.5) in the first, Group('head', lr=Polynomial("
    )
    assert "{" not in done.stdout
