"""What is found before the first step, where shards and workers would run."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from distnadam import DistNadam, Options
from distnadam.config import Settings
from distnadam.errors import CheckpointError
from distnadam.training.preflight import Preflight, preflight
from distnadam.training.run_plan import RetentionPolicy, RunPlan
from tests.training.test_fit import Quadratic, train


def tried(directory: Path, **settings: Any) -> Preflight:
    return preflight(
        Quadratic(),
        Settings.of(**DistNadam(num_workers=2, num_shards=2, **settings).get_config()),
        RunPlan(
            steps=10,
            save_every=None,
            evaluate_every=None,
            keep=RetentionPolicy(last=3, every=None, every_s=None),
        ),
        seed=0,
        checkpoint_dir=directory,
        resume="auto",
        is_given=False,
    )


@pytest.mark.on_ray
def test_a_run_that_can_be_is_planned_and_begins_where_its_checkpoint_is(
    tmp_path: Path, backend: str
) -> None:
    train(tmp_path, 4)
    before = sorted(path.name for path in tmp_path.iterdir())
    found = tried(tmp_path, backend=backend)
    assert found.problems == []
    plan = dict(found.plan)
    assert plan["parameters"] == "3,000 in 1 tensors, 11.7 KiB"
    assert plan["batch"] == "3000 samples a rank, 6000 a step"
    assert plan["begins at"].endswith("step_00000004")
    assert plan["checkpoint"] == "35.2 KiB, the last 3 are kept"
    assert plan["hosts"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_too_few_cpus_are_found_with_what_is_asked(tmp_path: Path, ray_cluster: None) -> None:
    options = Options(worker_cpus=64, start_timeout_s=2)
    (problem,) = tried(tmp_path, backend="ray", options=options).problems
    assert "64" in problem
    assert "CPU" in problem


def test_a_run_with_no_room_for_a_checkpoint_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"29.3 KiB are free, and the .* take 35.2 KiB"):
        train(tmp_path / "run", 4)
    assert not (tmp_path / "run").exists()
