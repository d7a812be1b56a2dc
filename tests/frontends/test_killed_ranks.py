"""Ranks that are killed in a step leave nothing running under a name that nobody gave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from distnadam import DistNadam
from distnadam.backends.ray import registry
from distnadam.backends.ray.processes import process_start_time
from distnadam.errors import NotRunning
from tests.eventually import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("ray_cluster"),
]
ROOT = Path(__file__).parents[2]
Rank = subprocess.Popen[str]


def start(port: int) -> list[Rank]:
    """Start two ranks as torchrun does, on the Ray of the tests."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    common |= {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/frontends/numpy_script.py")],
            env=os.environ | common | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def line(rank: Rank) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline().strip()


def go(rank: Rank) -> None:
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def alive(name: str) -> list[int]:
    """The processes of an optimizer, its shards, standbys and supervisor."""
    found = registry.addresses_of(registry.runs_of(name))
    return [each.pid for each in found if process_start_time(each.pid) == each.born]


def test_ranks_that_are_killed_in_a_step_leave_no_shards_running() -> None:
    runs = {victims: start(number) for number, victims in enumerate(((0,), (1,), (0, 1)))}
    try:
        for victims, ranks in runs.items():
            name = line(ranks[0])
            assert line(ranks[1]) == name and name.startswith("run-")
            eventually(lambda name=name: len(alive(name)) >= 5)  # the standbys too
            go(ranks[victims[0]])
            waited_for = [1 - victims[0]]
            shards = DistNadam.connect(name).shards
            eventually(lambda s=shards, w=waited_for: list(s.describe().waiting_for) == w)
            for victim in victims:
                os.kill(ranks[victim].pid, signal.SIGKILL)
            for survivor in {0, 1} - {*victims}:
                go(ranks[survivor])
                said = line(ranks[survivor])
                lost = "LifecycleError: " if victims == (0,) else "WorkerLost: "
                assert said.startswith(lost), said
                assert ranks[survivor].wait(100) == 0
            eventually(lambda name=name: not alive(name))
            with pytest.raises(NotRunning):
                DistNadam.connect(name)
    finally:
        for rank in (rank for ranks in runs.values() for rank in ranks):
            rank.kill()
            rank.communicate()
