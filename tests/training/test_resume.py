"""Resuming a run: with nothing to do, and after a Ctrl-C that skipped an evaluation."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distnadam.errors import CheckpointError, TrainingError
from distnadam.report.data import read_run
from tests.test_exports import BLOCKER
from tests.training.test_fit import Quadratic, train
from tests.training.test_settings import Listener

ROOT = Path(__file__).parents[2]
FINISHED = """
from distnadam import fit
from tests.training.test_fit import Quadratic
history = fit(Quadratic(), steps=5, backend="ray", checkpoint_dir="run", evaluate_every={every})
print(history.steps, history.metrics["distance"])
"""


def run_python(code: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_that_is_finished_starts_no_ray_and_says_so(tmp_path: Path) -> None:
    done = train(tmp_path / "run", 5)
    code = BLOCKER.format(names={"ray"}) + FINISHED.format(every=None)
    again = run_python(code, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"[] {done.metrics['distance']}\n"
    assert "nothing to do: 5 of 5 steps are done" in again.stderr


def test_a_run_that_was_killed_amid_its_first_save_begins_anew_and_says_so(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 5)
    killed = tmp_path / "run" / "step_00000003"
    killed.mkdir(parents=True)
    (killed / "shard_00000.msgpack").write_bytes(b"half of it")
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
        train(tmp_path / "run", 5, resume="must")
    listener = Listener()
    again = train(tmp_path / "run", 5, callbacks=[listener])
    assert again.resumed_from is None
    assert again.metrics == whole.metrics
    assert any("step_00000003: the save was not finished" in said for said in listener.messages)


class Interrupted(Quadratic):
    """Gets a Ctrl-C at its first step, once."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.struck = directory / "struck"

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        if rank == 0 and not self.struck.exists():
            self.struck.touch()
            signal.raise_signal(signal.SIGINT)
        return super().batch(step, rank, world_size)


def interrupted(directory: Path, steps: int) -> None:
    try:
        train(directory / "run", steps, task=Interrupted(directory), evaluate_every=1)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was interrupted")


def test_an_evaluation_that_a_ctrl_c_skipped_is_made_by_the_resumed_run(tmp_path: Path) -> None:
    interrupted(tmp_path, 4)
    history = train(tmp_path / "run", 4, evaluate_every=1)
    assert history.steps == [2, 3, 4]
    whole = train(tmp_path / "whole", 4, evaluate_every=1)
    assert history.evaluations == whole.evaluations


def test_an_evaluation_that_was_skipped_at_the_last_step_is_made_without_workers(
    tmp_path: Path,
) -> None:
    interrupted(tmp_path, 1)
    code = BLOCKER.format(names={"ray"}) + FINISHED.replace("steps=5", "steps=1").format(every=1)
    again = run_python(code, tmp_path)
    assert again.returncode == 0, again.stderr
    whole = train(tmp_path / "whole", 1)
    assert again.stdout == f"[] {whole.metrics['distance']}\n"


def test_an_evaluation_that_was_made_is_not_made_again(tmp_path: Path) -> None:
    train(tmp_path, 4, evaluate_every=2)
    listener = Listener()
    history = train(tmp_path, 6, evaluate_every=2, callbacks=[listener])
    assert [step for step, _ in history.evaluations] == [6]
    assert [step for step, _ in train(tmp_path, 6, evaluate_every=2).evaluations] == [6]


def test_a_run_that_begins_anew_over_one_that_saved_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        train(tmp_path, 20, Quadratic(fails_at=(0, 7)))
    heard = Listener()
    train(tmp_path, 20, callbacks=[heard])
    (line,) = [text for text in heard.messages if "beginning anew" in text]
    assert re.search(rf"the run before in {tmp_path} reached step [67] and saved no", line)
    found = read_run(tmp_path)
    assert found["recoveries"] == [], "those of the other run are not this one's"
    heard = Listener()
    train(tmp_path, 22, callbacks=[heard])
    assert not any("beginning anew" in text for text in heard.messages)
