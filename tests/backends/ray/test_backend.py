"""What only Ray brings: asks that cannot be met, names, handles in other processes, deaths, and a
Ray of our own.
"""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from distnadam import DistNadam, Options, waiting
from distnadam.backends.ray import nodes
from distnadam.backends.ray.supervisor_client import RaySupervisorClient
from distnadam.backends.ray.worker_group import RayWorkerGroup
from distnadam.client.building import start_shards
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Settings, Topology
from distnadam.errors import (
    InsufficientResources,
    LifecycleError,
    NameTaken,
    NotRunning,
    ShardLost,
    StepTimeout,
    Unrecoverable,
    VersionMismatch,
    WorkerLost,
)
from distnadam.tensors.layout import Layout
from tests.models import bits
from tests.processes import children, wait_until_gone

pytestmark = pytest.mark.usefixtures("ray_cluster")
START = {"w": np.ones(3000, np.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(shard_cpus=2), r"3 shards ask CPU 2 each, the nodes have 4 in all.*room for 2"),
        (Options(shard_resources={"TPU": 1}), "TPU 1 each, the nodes have 0 in all"),
        (Options(shard_memory_bytes=2**60), "memory"),
        (Options(label_selector={"zone": "moon"}), r"0 suitable node\(s\)"),
        (Options(label_selector={"zone": "in(moon, mars)"}), r"0 suitable node\(s\)"),
    ],
)
def test_an_ask_that_the_nodes_cannot_meet_is_refused_at_once_with_what_is_missing(
    options: Options, message: str
) -> None:
    with pytest.raises(InsufficientResources, match=message):
        DistNadam(num_shards=3, backend="ray", options=options).build(START)


@pytest.mark.nightly
def test_a_label_may_be_refused_rather_than_asked_for() -> None:
    with DistNadam(
        num_shards=2, replicas=1, backend="ray", options=Options(label_selector={"zone": "!moon"})
    ).build(START) as optimizer:
        assert optimizer.apply_gradients(START) == 1


def test_an_ask_may_be_waited_for_visibly(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InsufficientResources, match="TPU"):
        DistNadam(
            backend="ray", options=Options(shard_resources={"TPU": 1}, start_timeout_s=0.3)
        ).build(START)
    assert "waiting for nodes: 1 shards ask TPU 1" in caplog.text


@pytest.mark.nightly
def test_the_shards_ask_for_what_the_options_say() -> None:
    free = ray.available_resources()["CPU"]
    with DistNadam(num_shards=2, backend="ray", options=Options(shard_cpus=1.5)).build(
        START
    ) as optimizer:
        optimizer.apply_gradients(START)
        assert ray.available_resources()["CPU"] == free - 3


def test_a_named_optimizer_is_found_from_another_process_and_its_name_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @ray.remote(num_cpus=0)
    def elsewhere() -> int:
        with DistNadam.connect("found") as other:
            other.apply_gradients(START)
            return other.iterations

    with DistNadam(num_shards=2, lr=0.5, name="found", backend="ray").build(START) as optimizer:
        assert roles("found") <= set(our_processes().values())
        assert ray.get(elsewhere.remote()) == 1
        assert optimizer.iterations == 1
        assert DistNadam.connect("found").get_config()["lr"] == 0.5
        with monkeypatch.context() as upgraded:
            upgraded.setattr(nodes, "VERSION", 7)
            with pytest.raises(VersionMismatch, match=r"node .* has protocol \d, the driver has 7"):
                DistNadam.connect("found")
        with pytest.raises(NameTaken, match=r"'found' is running.* `distnadam stop found`"):
            DistNadam(name="found", backend="ray").build(START)
        assert optimizer.apply_gradients(START) == 2
    with pytest.raises(NotRunning, match="no optimizer named 'found'"):
        DistNadam.connect("found")
    wait_until_none_is_left()


@pytest.mark.parametrize(
    "place",
    [
        (ShardGroup, "_begin"),
        pytest.param((RaySupervisorClient, "open_shards"), marks=pytest.mark.nightly),  # a minute
    ],
)
def test_what_a_killed_creator_left_of_a_named_optimizer_is_said_and_ended(
    place: tuple[type, str],
) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def create() -> None:
        setattr(*place, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        options = Options(step_timeout_s=1)
        DistNadam(num_shards=2, name="left", backend="ray", options=options).build(START)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(create.remote())
    with pytest.raises(NameTaken, match="`distnadam stop left`"):
        DistNadam(name="left", backend="ray").build(START)
    with pytest.raises(StepTimeout, match=r"'left': whoever builds it .`distnadam stop left`"):
        DistNadam.connect("left")
    DistNadam.stop("left")
    wait_until_none_is_left()
    with DistNadam(num_shards=2, name="left", backend="ray").build(START) as optimizer:
        assert optimizer.apply_gradients(START) == 1


@pytest.mark.parametrize("how", ["build", "restore"])
def test_who_connects_before_the_shards_have_their_state_waits_for_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, go_on, give = threading.Event(), threading.Event(), ShardGroup._begin

    def late(group: ShardGroup, *args: Any) -> None:
        came.set()
        assert go_on.wait(100)
        give(group, *args)

    settings: dict[str, Any] = {"num_workers": 2, "backend": "ray", "name": "late"}
    with DistNadam(num_shards=2).build(START) as saved:
        saved.save(str(tmp_path))
    monkeypatch.setattr(ShardGroup, "_begin", late)
    with ThreadPoolExecutor() as threads:
        if how == "build":
            making = threads.submit(DistNadam(num_shards=2, **settings).build, START)
        else:
            making = threads.submit(DistNadam.restore, str(tmp_path), **settings)
        assert came.wait(100)
        connecting = threads.submit(DistNadam.connect, "late")
        with pytest.raises(TimeoutError):
            connecting.result(0.5)
        go_on.set()
        with making.result() as optimizer, connecting.result() as other:
            assert other.get_params()["w"].tobytes() == START["w"].tobytes()
            workers = [optimizer.worker(0), other.worker(1)]
            stepped = list(threads.map(lambda worker: worker.step(START)["w"].copy(), workers))
            assert stepped[0].tobytes() == stepped[1].tobytes()
            for worker in workers:
                worker.close()


def test_a_wait_for_shards_that_get_no_state_ends_and_says_for_what(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "REPORT_WAIT_S", 0.05)
    settings = Settings(
        options=Options(step_timeout_s=1.0), topology=Topology(backend="ray", name="never")
    )
    shards = start_shards(settings, Layout.of(START))
    try:
        with pytest.raises(StepTimeout, match=r"connecting to 'never': .* did not give"):
            DistNadam.connect("never")
    finally:
        shards.backend.close(destroy=True)
    assert "connecting to 'never': has waited" in caplog.text
    assert "for whoever builds it to give the shards their state: shards 0 are " in caplog.text


def test_handles_and_workers_travel_to_tasks_and_actors() -> None:
    @ray.remote(num_cpus=0)
    class Trainer:
        def __init__(self, worker: Any) -> None:
            self.worker = worker

        def train(self, steps: int) -> bytes:
            for _ in range(steps):
                params = self.worker.step(START)
            return bytes(params["w"].tobytes())

    with DistNadam(num_shards=2, num_workers=2, backend="ray").build(START) as optimizer:
        assert roles("") <= set(our_processes().values())
        actors = [Trainer.remote(optimizer.worker(rank)) for rank in range(2)]
        ends = ray.get([actor.train.remote(3) for actor in actors])
        assert ends[0] == ends[1] == optimizer.get_params()["w"].tobytes()
    wait_until_none_is_left()


@pytest.mark.nightly
def test_a_copy_that_closes_only_detaches() -> None:
    @ray.remote(num_cpus=0)
    def use(optimizer: DistNadam) -> int:
        with optimizer:
            return optimizer.apply_gradients(START)

    with DistNadam(backend="ray").build(START) as optimizer:
        assert ray.get(use.remote(optimizer)) == 1
        assert optimizer.apply_gradients(START) == 2
    with pytest.raises(LifecycleError, match="closed"):
        optimizer.get_params()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "error"), [(Unrecoverable, Unrecoverable), (ShardLost, WorkerLost)]
)
def test_a_worker_that_cannot_start_says_why_and_whether_another_start_may_help(
    raised: type[Exception], error: type[Exception]
) -> None:
    def make(rank: int) -> Any:
        raise raised(f"rank {rank} is without shards")

    group = RayWorkerGroup(1, make, Options(worker_cpus=0), 1)
    try:
        group.call(0, "run", 1)
        [(rank, found)] = group.results(60)
    finally:
        group.close()
    assert rank == 0 and type(found) is error
    assert str(found) == "worker 0: it could not start: rank 0 is without shards"


def test_a_killed_shard_without_restore_point_is_an_error_that_names_the_remedy() -> None:
    options = Options(retain_initial=False)
    with DistNadam(num_shards=2, num_workers=2, backend="ray", options=options).build(
        START
    ) as optimizer:
        ticket = optimizer.worker(0).push(START)
        ray.kill(optimizer.shards.backend.actors[1])  # type: ignore[attr-defined]
        with pytest.raises(
            Unrecoverable,
            match=r"shard 1 died .* no checkpoint to go back to: save, set "
            r"Options\(checkpoint_dir=\.\.\.\)",
        ):
            ticket.result()


def our_processes() -> dict[int, str]:
    """The titles of shards and supervisors below this process, without the method that runs."""
    titles = {pid: title_of(pid).partition(".")[0] for pid in children(os.getpid())}
    return {pid: title for pid, title in titles.items() if title.startswith("ray::distnadam ")}


def roles(name: str) -> set[str]:
    """The titles of an optimizer's two shards and its supervisor."""
    begin = " ".join(filter(None, ["ray::distnadam", name]))
    return {f"{begin} {role}" for role in ("Shard 0", "Shard 1", "Supervisor")}


def wait_until_none_is_left() -> None:
    while our_processes():
        pass  # the test's time limit bounds it


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip(" \0")
    except OSError:
        return ""


QUIET = """
import os, ray
import numpy as np
from distnadam import DistNadam

ray.init(address=os.environ["CLUSTER"])
for replicas in (0, 1, 0):
    built = DistNadam(num_shards=5, replicas=replicas, backend="ray")
    with built.build({"w": np.ones(3000, np.float32)}) as optimizer:
        optimizer.apply_gradients({"w": np.ones(3000, np.float32)})
"""


@pytest.mark.slow
def test_ray_tells_the_user_of_nothing_where_all_went_well() -> None:
    env = os.environ | {"CLUSTER": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert not [line for line in done.stderr.splitlines() if "pid=" in line or "raylet" in line]


@pytest.mark.nightly
def test_backends_agree_on_a_model_with_an_empty_shard() -> None:
    tiny = {"w": np.ones(3, np.float32)}
    with (
        DistNadam(num_shards=4, backend="ray").build(tiny) as one,
        DistNadam(backend="local").build(tiny) as other,
    ):
        one.apply_gradients(tiny)
        other.apply_gradients(tiny)
        assert bits(one) == bits(other)


OWN = """
import os, sys
import numpy as np
from distnadam import DistNadam
from distnadam.errors import LifecycleError
with DistNadam(num_shards=2, backend="ray").build({"w": np.ones(3, np.float32)}) as optimizer:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    print(optimizer.apply_gradients({"w": np.ones(3, np.float32)}), flush=True)
    worker = optimizer.worker(0)
    sys.stdin.read()
try:
    worker.pull()
except LifecycleError as error:
    assert "closed in this process" in str(error)
else:
    raise AssertionError
import ray
assert not ray.is_initialized(), "looking started another Ray"
"""


@pytest.mark.parametrize(
    "end", ["close", pytest.param("kill", marks=pytest.mark.nightly)]
)  # Ray notices a killed driver after a minute, as a slow test of whole runs shows
def test_a_ray_of_our_own_has_a_token_writes_no_home_and_leaves_no_process(
    end: str, tmp_path: Path
) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")} | {
        "HOME": str(tmp_path)
    }
    process = subprocess.Popen(
        [sys.executable, "-c", OWN],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "1"
    below = children(process.pid)
    assert len(below) > 3
    if end == "kill":
        process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if end == "kill" else 0)
    assert not (tmp_path / ".ray").exists()
    wait_until_gone(below)
