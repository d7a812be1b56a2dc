"""`train` from a run's own file, `--dry-run`, and the completion of shells."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distnadam import DistNadam
from distnadam.cli import main

TASK = """
import abc, os, threading
import numpy as np

class Line:
    def init(self, seed):
        return {"w": np.zeros(4, np.float32)}
    def batch(self, step, rank, world_size):
        return np.random.default_rng([step, rank, world_size]).standard_normal(4).astype("f4")
    def loss_and_gradients(self, params, batch):
        error = params["w"] - batch
        return float(error @ error), {"w": 2 * error}
    def evaluate(self, params):
        return {"w": float(params["w"].sum())}

class Restless(Line):
    def batch(self, step, rank, world_size):
        return np.frombuffer(os.urandom(16), np.uint8)[:4].astype("f4")

class Dropping(Line):
    def loss_and_gradients(self, params, batch):
        loss, gradients = super().loss_and_gradients(params, batch)
        return loss, {"w": gradients["w"] * np.frombuffer(os.urandom(4), np.uint8)}

class Locked(Line):
    def init(self, seed):
        self.lock = threading.Lock()
        return super().init(seed)

class Misshapen(Line):
    def loss_and_gradients(self, params, batch):
        return 0.5, {"v": batch}

class Needing(Line):
    def init(self, seed):
        import nobody_has_this

class Unmade(Line):
    def __init__(self):
        raise ValueError("not yet")

class Wide(Line):
    def __init__(self, width):
        pass

class Abstract(Line, abc.ABC):
    @abc.abstractmethod
    def batch(self, step, rank, world_size): ...

class Wordless(Line):
    def evaluate(self, params):
        pass

class Worded(Line):
    def evaluate(self, params):
        return {"w": params["w"]}

class Broken(Line):
    def batch(self, step, rank, world_size):
        return self.data[step]
"""


HALF = """
class Half:
    def init(self, seed): ...
    def batch(self, step, rank, world_size): ...
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test
    return CliRunner()


def call(runner: Any, *args: str) -> Any:
    return runner.invoke(main, list(args))


def bits(directory: Path) -> bytes:
    with DistNadam.restore(directory, backend="local") as optimizer:
        return bytes(optimizer.get_params()["w"].tobytes())


def test_a_run_is_run_again_from_its_file_with_the_same_bits(runner: Any, tmp_path: Path) -> None:
    options = ["--local", "--steps", "12", "--workers", "3", "--lr", "0.1", "--seed", "2"]
    more = ["--weight-decay", "0.5", "--save-every", "5", "--worker-label", "zone=a b"]
    begun = call(runner, "train", "mine.py:Line", *options, *more, "--checkpoint-dir", "first")
    assert begun.exit_code == 0, begun.output
    text = (tmp_path / "first" / "run.toml").read_text()
    for line in ("lr = 0.1", "workers = 3", "local = true", 'worker-label = ["zone=a b"]'):
        assert line in text.splitlines()
    assert "checkpoint-dir" not in text, "else it would go on with the first run"
    again = call(runner, "train", "first/run.toml", "--checkpoint-dir", "second", "--quiet")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "second" / "run.toml").read_text() == text
    assert bits(tmp_path / "first") == bits(tmp_path / "second")
    other = call(runner, "train", "first/run.toml", "--checkpoint-dir", "third", "--steps", "4")
    assert other.exit_code == 0
    assert [path.name for path in (tmp_path / "third").glob("step_*")] == ["step_00000004"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 3", 'needs task = "..."'),
        ("task = 'digits'\nsteps = 'many'", "steps = 'many': .* not a valid integer"),
        ("task = 'digits'\n[run]\nepochs = 3", "there is no option 'epochs'; known are workers"),
        ("task = ", "is no TOML"),
        ("steps = " + "9" * 5000, "is no TOML"),
        ("task = " + "[" * 100_000, "is no TOML"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(
    text: str, said: str, runner: Any, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text)
    result = call(runner, "train", "run.toml")
    assert result.exit_code == 1
    assert re.search(f"run.toml: {said}", result.output), result.output


def test_a_dry_run_prints_the_plan_and_leaves_nothing_behind(runner: Any, tmp_path: Path) -> None:
    result = call(runner, "train", "mine.py:Line", "--local", "--dry-run", "--steps", "7")
    assert result.exit_code == 0, result.output
    for word in ("parameters   4 in 1 tensors", "steps        7", "local: this process"):
        assert word in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("Restless", "gives another batch when it is asked again"),
        ("Dropping", r"gives something else for the same parameters and batch \(in gradients/w\)"),
        ("Locked", "cannot be copied|cannot pickle"),
        ("Misshapen", "the gradients"),
        ("Needing", "init: the task needs the module 'nobody_has_this', .* on every host"),
        ("Broken", r"raised AttributeError: .* \(mine.py, line \d+\)"),
    ],
)
def test_a_dry_run_finds_what_is_wrong_with_a_task(task: str, said: str, runner: Any) -> None:
    result = call(runner, "train", f"mine.py:{task}", "--local", "--dry-run")
    assert result.exit_code == 1, result.output
    (problem,) = [line for line in result.output.splitlines() if line.startswith("problem: ")]
    assert re.search(said, problem), problem


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_what_a_tasks_file_needs_and_nobody_has_is_one_sentence(
    how: list[str], runner: Any, tmp_path: Path
) -> None:
    (tmp_path / "needy.py").write_text("import nobody_has_this.part\n")
    for task, said in [
        ("needy.py:Task", "needy.py: needs the module 'nobody_has_this', which .* on every host"),
        ("mine.py:Needing", "init: the task needs the module 'nobody_has_this', which .* every"),
        ("mine.py:Unmade", r"mine.py:Unmade: the task raised ValueError: not yet \(mine.py, line"),
    ]:
        result = call(runner, "train", task, "--local", *how)
        assert result.exit_code == 1
        assert re.search(f"(distnadam|problem): {said}", result.output), result.output
        assert result.output.count("nobody_has_this") <= 1


def test_a_verbosity_is_keras_s(runner: Any) -> None:
    how = ["train", "mine.py:Line", "--local", "--steps", "4", "--evaluate-every", "2"]
    lines = {
        each: call(runner, *how, "--verbose", each).stderr.splitlines() for each in ("0", "1", "2")
    }
    assert lines["0"] == []
    assert any("left" in line or "loss" in line for line in lines["1"])
    assert [line.split("  ")[0] for line in lines["2"]] == ["step 2/4", "step 4/4"]
    assert call(runner, *how, "--quiet").stderr == ""
    assert call(runner, *how, "--verbose", "3").exit_code == 2


def test_a_dry_run_finds_a_full_disk_and_a_directory_that_is_none(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    args = ["train", "mine.py:Line", "--local", "--dry-run", "--checkpoint-dir"]
    result = call(runner, *args, "file/run")
    assert "file: cannot be made or written: it is no directory" in result.output
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    often = ["--save-every", "10"]
    result = call(runner, *args, "run", *often)
    assert result.exit_code == 1
    assert (
        "100 B are free, and 4 checkpoints, which are kept at a time, will take 192 B"
        in result.output
    )
    begun = call(runner, *[each for each in args if each != "--dry-run"], "run", *often)
    assert begun.exit_code == 1
    assert result.output.partition("problem: ")[2] in begun.output, "train says the same"
    assert call(runner, *args, "run").exit_code == 0, "one checkpoint fits"


def test_a_dry_run_finds_a_directory_that_may_not_be_written(runner: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    command = [sys.executable, "-m", "distnadam", "train", "mine.py:Line", "--local", "--dry-run"]
    if os.geteuid() == 0:  # whom modes do not keep out, unless it is without that capability
        if shutil.which("setpriv") is None:
            pytest.skip("there is no setpriv")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all", *command]
    ended = subprocess.run(
        [*command, "--checkpoint-dir", "theirs/run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 1
    (said,) = [line for line in ended.stderr.splitlines() if line.startswith("problem: ")]
    assert "theirs: cannot be made or written: you may not write there" in said


@pytest.mark.slow
def test_a_zero_that_is_no_default_is_in_the_file(runner: Any, tmp_path: Path) -> None:
    options = ["--local", "--steps", "5", "--optimizer", "adamw", "--weight-decay", "0"]
    begun = call(runner, "train", "mine.py:Line", *options, "--checkpoint-dir", "first")
    assert begun.exit_code == 0, begun.output
    again = call(runner, "train", "first/run.toml", "--checkpoint-dir", "second", "--quiet")
    assert again.exit_code == 0, again.output
    configs = []
    for name in ("first", "second"):
        with DistNadam.restore(tmp_path / name, backend="local") as optimizer:
            configs.append(optimizer.get_config())
    assert configs[0] == configs[1]
    assert configs[0]["weight_decay"] == 0.0


def test_what_a_task_lacks_is_named(runner: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HALF)
    said = call(runner, "train", "mine.py:Half", "--local").output
    assert "it has no loss_and_gradients, evaluate" in " ".join(said.split())
    assert "there is no 'Whole' in mine.py" in call(runner, "train", "mine.py:Whole").output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("mine.py", "give mine.py:NAME, where NAME is the task's class"),
        (
            "mine.py:Wide",
            "'width'): make an object in the file, task = Wide(...), and give",
        ),
        ("mine.py:Abstract", "mine.py:Abstract: has no batch yet: write them"),
        ("mine.py:Wordless", "evaluate after step 1: expected a dict of numbers by name, got"),
        ("mine.py:Worded", "evaluate after step 1: w: expected a number, got ndarray"),
    ],
)
def test_what_is_no_task_yet_is_said_with_what_to_do(args: str, said: str, runner: Any) -> None:
    ended = call(runner, "train", args, "--local", "--steps", "1", "--quiet")
    assert ended.exit_code in (1, 2)
    assert said in " ".join(ended.output.split())
    assert "Traceback" not in ended.output


def test_a_dry_run_says_that_a_ray_cannot_be_reached(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "distnadam", "train", "mine.py:Line", "--dry-run"]
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "problem: " in ended.stderr
    assert "127.0.0.1:1" in ended.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_read_its_completion(shell: str, runner: Any, tmp_path: Path) -> None:
    result = call(runner, "completion", shell)
    assert result.exit_code == 0
    assert "_DISTNADAM_COMPLETE" in result.output
    script = tmp_path / f"completion.{shell}"
    script.write_text(result.output)
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    subprocess.run([shell, "-n", str(script)], check=True)


def test_shellcheck_has_nothing_against_the_completion_of_bash(runner: Any, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck")
    script = tmp_path / "completion.bash"
    script.write_text(call(runner, "completion", "bash").output)
    ended = subprocess.run(
        ["shellcheck", "--shell=bash", str(script)], capture_output=True, text=True, check=False
    )
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distnadam rep", "report"),
        ("distnadam completion z", "zsh"),
        ("distnadam ver", "verify"),
        ("distnadam train --verbo", "--verbose"),
        ("distnadam train digits --verbose a", "auto"),
    ],
)
def test_bash_completes_a_line(line: str, expected: str, runner: Any, tmp_path: Path) -> None:
    script = call(runner, "completion", "bash").output
    words = line.split()
    command = tmp_path / "distnadam"
    program = "from distnadam.cli import main; main(prog_name='distnadam')"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    command.chmod(0o755)
    asked = (
        f"{script}\ncompopt() {{ :; }}\nCOMP_WORDS=({line})\nCOMP_CWORD={len(words) - 1}\n"
        f'_distnadam_completion {command}\necho "${{COMPREPLY[@]}}"\n'
    )
    ended = subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert ended.stdout.split() == [expected], ended.stderr


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("zsh", {"COMP_WORDS": "distnadam train digits --verbose", "COMP_CWORD": "4"}),
        ("fish", {"COMP_WORDS": "distnadam train digits --verbose ", "COMP_CWORD": ""}),
    ],
)
def test_other_shells_are_told_what_an_option_takes(
    shell: str, asked: dict[str, str], runner: Any
) -> None:
    environment = {"_DISTNADAM_COMPLETE": f"{shell}_complete", **asked}
    found = runner.invoke(main, [], env=environment, prog_name="distnadam").output
    assert [each for each in re.split(r"[\s,]+", found) if each in ("auto", "0", "1", "2")] == [
        *("auto", "0", "1", "2")
    ], found


def test_commands_are_listed_by_purpose(runner: Any) -> None:
    shown = call(runner, "--help").output
    for title in ("Training:", "A running optimizer:", "Hosts:", "Checkpoints:"):
        assert title in shown
    assert shown.index("train") < shown.index("status") < shown.index("inspect")
    of_train = call(runner, "train", "--help").output
    section = of_train.partition("What is shown:")[2].partition("\n\n")[0]
    for option in ("--verbose [auto|0|1|2]", "--quiet", "--dashboard", "--json"):
        assert option in section, section
