"""Named optimizers whose supervisor dies, on real processes: its successor finds who lives, ends
who does not answer, and goes on.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from distnadam import DistNadam, Options
from distnadam.backends.ray import registry
from distnadam.backends.ray.backend import RayBackend
from distnadam.backends.ray.processes import process_start_time
from distnadam.errors import NotRunning, Rewound
from tests.eventually import eventually
from tests.models import bits

pytestmark = pytest.mark.usefixtures("ray_cluster")
SIZE = 5000
START = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}


def gradient(number: int) -> Any:
    return {"w": np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)}


def build(name: str, root: Path | None = None, **how: Any) -> DistNadam:
    options = Options(
        shard_timeout_s=3.0, step_timeout_s=60.0, checkpoint_dir=None if root is None else str(root)
    )
    return DistNadam(
        **({"num_shards": 2, "backend": "ray", "name": name, "options": options} | how)
    ).build(START)


def step_to(optimizer: DistNadam, end: int) -> None:
    """Apply steps, however often the shards go back, until so many are applied."""
    while True:
        try:
            while (done := optimizer.round) < end:
                optimizer.apply_gradients(gradient(done))
            return
        except Rewound:
            continue


def undisturbed(end: int) -> list[bytes]:
    with DistNadam(backend="local").build(START) as optimizer:
        step_to(optimizer, end)
        return bits(optimizer)


def backend_of(optimizer: DistNadam) -> RayBackend:
    backend = optimizer.shards.backend
    assert isinstance(backend, RayBackend)
    return backend


def supervisor_of(optimizer: DistNadam) -> int:
    return int(backend_of(optimizer).supervisor.about()["pid"])


def processes_of(name: str) -> set[tuple[int, str]]:
    """The processes that an optimizer of this name has, or left."""
    return {
        (address.pid, address.born) for address in registry.addresses_of(registry.runs_of(name))
    }


def wait_until_another_supervises(optimizer: DistNadam, before: int) -> None:
    while supervisor_of(optimizer) == before:
        pass  # the test's time limit bounds it


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_successor_ends_a_stopped_shard_which_never_wakes_up(
    replicas: int, tmp_path: Path
) -> None:
    optimizer = build(f"stopped{replicas}", tmp_path, replicas=replicas)
    try:
        step_to(optimizer, 3)
        victim, supervisor = backend_of(optimizer).addresses[1], supervisor_of(optimizer)
        os.kill(victim.pid, signal.SIGSTOP)
        os.kill(supervisor, signal.SIGKILL)
        wait_until_another_supervises(optimizer, supervisor)
        step_to(optimizer, 6)
        assert process_start_time(victim.pid) != victim.born, (
            "a process that was replaced must not be there to wake up"
        )
        assert bits(optimizer) == undisturbed(6)
    finally:
        optimizer.close()
    assert processes_of(f"stopped{replicas}") == set()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("shards", "together"), [pytest.param(1, False, marks=pytest.mark.nightly), (3, True)]
)
def test_after_a_reshard_a_successor_finds_the_shards_that_there_are_now(
    shards: int, together: bool, tmp_path: Path
) -> None:
    name = f"resharded-to-{shards}"
    with build(name, tmp_path) as optimizer:
        step_to(optimizer, 3)
        optimizer.reshard(shards)
        step_to(optimizer, 5)
        optimizer.save(tmp_path)
        supervisor = supervisor_of(optimizer)
        os.kill(supervisor, signal.SIGKILL)
        if not together:
            wait_until_another_supervises(optimizer, supervisor)
        os.kill(backend_of(optimizer).addresses[-1].pid, signal.SIGKILL)
        wait_until_another_supervises(optimizer, supervisor)
        step_to(optimizer, 8)
        assert len(backend_of(optimizer).addresses) == shards
        assert len(DistNadam.connect(name).shards.ranges) == shards
        assert bits(optimizer) == undisturbed(8)
        assert len(processes_of(name)) == shards + 1
    assert processes_of(name) == set()


@pytest.mark.nightly
def test_an_optimizer_is_ended_by_name_even_if_only_its_shards_are_left() -> None:
    optimizer = build("ended", replicas=1)
    there = processes_of("ended")
    assert len(there) >= 3
    DistNadam.stop("ended")
    with pytest.raises(NotRunning, match="no optimizer named 'ended'"):
        DistNadam.connect("ended")
    assert not any(process_start_time(pid) == born for pid, born in there)
    optimizer.close()

    build("orphaned")
    ray.kill(ray.get_actor("orphaned", namespace="distnadam"))  # for good
    DistNadam.stop("orphaned")
    assert processes_of("orphaned") == set()
    with pytest.raises(NotRunning, match="no optimizer named 'orphaned'"):
        DistNadam.stop("orphaned")
    with build("orphaned") as again:
        assert again.apply_gradients(gradient(0)) == 1


MAKER = """
import sys
from distnadam import DistNadam, Options
from tests.backends.ray.test_discovery import START, gradient
options = Options(outlives=False)
optimizer = DistNadam(name="owned", num_shards=2, replicas=1, options=options).build(START)
optimizer.apply_gradients(gradient(0))
print("built", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_one_that_does_not_outlive_its_maker_survives_its_supervisor_and_ends_with_the_maker() -> (
    None
):
    root = str(Path(__file__).parents[3])
    address = ray.get_runtime_context().gcs_address
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER],
        env=os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert maker.stdout is not None and maker.stdout.readline() == "built\n"
        optimizer = DistNadam.connect("owned")
        eventually(lambda: set(optimizer.shards.backend.standbys()) == {0, 1})
        shards = backend_of(optimizer).addresses
        supervisor = supervisor_of(optimizer)
        os.kill(supervisor, signal.SIGKILL)
        wait_until_another_supervises(optimizer, supervisor)
        step_to(optimizer, 3)
        assert bits(optimizer) == undisturbed(3)
        assert [a.pid for a in backend_of(optimizer).addresses] == [a.pid for a in shards]
        there = processes_of("owned")
        assert len(there) == 5
        maker.kill()
        eventually(lambda: not any(process_start_time(pid) == born for pid, born in there))
        with pytest.raises(NotRunning, match="no optimizer named 'owned'"):
            DistNadam.connect("owned")
        DistNadam.stop("owned")  # of what it was, Ray still has a record
        assert processes_of("owned") == set()
    finally:
        maker.kill()
        maker.communicate()


@pytest.mark.nightly
@pytest.mark.parametrize("hurt", [signal.SIGSTOP, signal.SIGKILL])
def test_close_leaves_no_process_if_the_supervisor_and_a_shard_are_hurt(
    hurt: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distnadam.backends.ray.names._CLOSE_S", 1.0)
    optimizer = build(f"hurt{hurt}")
    there = processes_of(f"hurt{hurt}")
    os.kill(backend_of(optimizer).addresses[0].pid, signal.SIGSTOP)
    os.kill(supervisor_of(optimizer), hurt)
    optimizer.close()
    assert not any(process_start_time(pid) == born for pid, born in there)
    assert processes_of(f"hurt{hurt}") == set()


def test_close_of_an_unnamed_one_ends_a_stopped_shard() -> None:
    optimizer = DistNadam(num_shards=2, backend="ray").build(START)
    victim = backend_of(optimizer).addresses[1]
    os.kill(victim.pid, signal.SIGSTOP)
    optimizer.close()
    assert process_start_time(victim.pid) != victim.born


class Sleeper:
    """A member of a team."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.nightly
def test_stopped_members_of_a_team_end_if_replaced_and_with_the_team() -> None:
    with DistNadam(num_workers=2, backend="ray").build(START) as optimizer:
        team = optimizer.team(Sleeper)
        for rank in range(2):
            team.call(rank, "pid")
        pids: dict[int, int] = {}
        while len(pids) < 2:
            pids |= dict(team.results(1.0))
        born = {pid: process_start_time(pid) for pid in pids.values()}
        for pid in born:
            os.kill(pid, signal.SIGSTOP)
        team.end(0)
        team.start(0)
        assert process_start_time(pids[0]) != born[pids[0]]
        team.close()
        assert process_start_time(pids[1]) != born[pids[1]]
