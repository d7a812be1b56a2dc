"""A dozen faults on real processes: the same bits as without them, every push counted once, and
nothing left behind.
"""

import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distnadam.checkpoint import store
from distnadam.checkpoint.storage.resolve import open_directory
from tests.chaos.command import RAYS_OWN, strike
from tests.chaos.faults import FAULTS
from tests.chaos.leftovers import leftovers, wait_for_no_more_than
from tests.chaos.run import Report, cases, cases_of_nodes, compare, count, kill, play
from tests.chaos.scene import Case, stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SEED = 4


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [12, pytest.param(48, marks=pytest.mark.nightly)])
def test_faults_of_many_kinds_change_no_bit_and_count_every_push_once(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    report = play(count, SEED)
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.differences, str(report)
    assert (report.faults, report.lost, report.doubled) == (count, 0, 0)
    assert len(report.kinds) >= 8


@pytest.mark.nightly  # tests/hosts kill a host with all that lives on it
@pytest.mark.timeout(600)
def test_a_ray_node_that_dies_with_all_that_lives_on_it_changes_no_bit() -> None:
    command = [
        sys.executable,
        "-m",
        "tests.chaos.run",
        "--nodes",
        "--faults",
        "6",
        "--seed",
        str(SEED),
        "--only",
        "node killed",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False
    )  # several nodes are a Ray of their own
    assert done.returncode == 0, done.stdout
    assert "gradients lost 0, doubled 0" in done.stdout


@pytest.mark.timeout(300)
def test_a_supervisors_successor_goes_back_to_where_the_last_save_went(tmp_path: Path) -> None:
    kinds, report = {fault.name: fault for fault in FAULTS}, Report()
    with stage(Case(2, 0, named=True), tmp_path, "successor") as scene:
        scene.await_step(time.monotonic())
        scene.optimizer.save(tmp_path / "elsewhere")
        kill(
            scene,
            [kinds["supervisor killed"], kinds["shard killed"]],
            np.random.default_rng(SEED),
            report,
        )
        assert scene.counts()["rewound"] == 1
        compare(scene, report)
    assert not report.differences, str(report)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, named=True, checkpoints=True),
        pytest.param(Case(2, 0, named=True, checkpoints=True), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_close_after_deaths_of_all_kinds_leaves_nothing_behind(case: Case, tmp_path: Path) -> None:
    gc.collect()
    before, report = leftovers(), Report()
    names = {"worker killed", "shard killed", "standby killed", "saver killed", "supervisor killed"}
    with stage(case, tmp_path, "leftovers") as scene:
        kill(
            scene,
            [fault for fault in FAULTS if fault.name in names and fault.fits(case)],
            np.random.default_rng(SEED),
            report,
        )
        during = leftovers()
        del scene
    assert all(during[what] > before[what] for what in ("actors", "sockets", "memfds"))
    gc.collect()
    wait_for_no_more_than(before)
    # a saver that was killed leaves its file in a folder that is no checkpoint, or beside one that
    # is whole
    whole = [
        folder
        for folder in store.step_directories(open_directory(tmp_path / "checkpoints"))
        if store.MANIFEST in folder.files()
    ]
    assert whole and all(store.verify(folder) for folder in whole)


def test_every_kind_of_fault_fits_a_configuration_and_has_a_name_of_its_own() -> None:
    every = [*cases(np.random.default_rng(0)), *cases_of_nodes()]
    assert all(any(fault.fits(case) for case in every) for fault in FAULTS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_the_ledgers_count_sees_lost_and_doubled_gradients() -> None:
    assert count({"runs": [[0, 1, 1, 5], [1, 1, 1, 3], [1, 2, 4, 5]]}, 5) == (0, 0)
    assert count({"runs": [[0, 1, 1, 5], [1, 1, 1, 3], [1, 2, 5, 5]]}, 5) == (1, 0)
    assert count({"runs": [[0, 1, 1, 5], [1, 1, 1, 3], [1, 2, 3, 5]]}, 5) == (0, 1)
    left = ((1, (0, 1)), (3, (0,)), (5, (0, 1)))
    assert count({"runs": [[0, 1, 1, 5], [1, 1, 1, 2], [1, 2, 5, 5]]}, 5, left) == (0, 0)
    assert count({"runs": [[0, 1, 1, 5], [1, 1, 1, 3], [1, 2, 5, 5]]}, 5, left) == (0, 1)
    assert count({"runs": [[0, 1, 1, 5], [1, 1, 1, 2]]}, 5, left) == (1, 0)


@pytest.mark.nightly  # tests/backends/ray/test_ray_dies.py kills them under a program
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", RAYS_OWN)
def test_a_process_of_rays_own_that_dies_under_the_command_changes_no_bit(
    tmp_path: Path, kind: str
) -> None:
    assert strike(kind, np.random.default_rng(SEED), tmp_path) == ""
