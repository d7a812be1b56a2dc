"""What the chaos suite strikes at: one configuration of an optimizer on Ray with its trainers, and
who runs in which process.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from distnadam import DistNadam, Group, LossScale, Options
from distnadam.backends.ray.backend import RayBackend
from distnadam.backends.ray.processes import process_start_time
from distnadam.backends.ray.supervisor_client import RaySupervisorClient
from distnadam.protocol.messages import Describe, Description, Pause, Resume
from distnadam.protocol.supervisor_messages import MembershipHistory, Reconfigure
from tests.chaos.trainers import (
    PATIENCE_S,
    WORKERS,
    Crowd,
    Process,
    Progress,
    contribute,
)
from tests.models import params

STEP_TIMEOUT_S = 12.0
SHARD_TIMEOUT_S = 6.0
REJOIN_TIMEOUT_S = 1.0
GROUPS = [Group("dense/*", beta_1=0.5, beta_2=0.9)]
"""Where tensors have clocks."""
SCALED = {
    "loss_scale": LossScale(init_scale=64.0, growth_interval=20),
    "use_ema": True,
    "weight_decay": 0.01,
    "decoupled_weight_decay": True,
}
"""Where gradients are of a scaled loss."""


@dataclass(frozen=True)
class Case:
    """One configuration. `checkpoints`: whether there is a directory to go back to from the
    beginning, or only `build`'s parameters. `scaled`: with a loss scale, micro-batches, an average
    and weight decay.
    """

    num_shards: int
    replicas: int
    clipnorm: float | None = None
    named: bool = False
    checkpoints: bool = False
    transport: str = "auto"
    nodes: int = 1
    elastic: bool = False
    clocks: Literal["one", "tensor"] = "one"
    scaled: bool = False

    def __str__(self) -> str:
        said = [f"num_shards={self.num_shards}", f"replicas={self.replicas}"]
        said += [
            name
            for name in ("clipnorm", "named", "checkpoints", "elastic", "scaled")
            if getattr(self, name)
        ]
        said += [f"nodes={self.nodes}"] if self.nodes > 1 else []
        said += ["clocks"] if self.clocks == "tensor" else []
        return " ".join([*said, *(["objects"] if self.transport == "objects" else [])])

    def optimizer(self, directory: Path, name: str | None) -> DistNadam:
        """Return the optimizer, not yet built."""
        options = Options(
            step_timeout_s=STEP_TIMEOUT_S,
            shard_timeout_s=SHARD_TIMEOUT_S,
            rejoin_timeout_s=REJOIN_TIMEOUT_S if self.elastic else 60.0,
            min_workers=1 if self.elastic else None,
            checkpoint_dir=str(directory) if self.checkpoints else None,
            transport=self.transport,  # type: ignore[arg-type]
        )
        how = {
            "num_shards": self.num_shards,
            "replicas": self.replicas,
            "name": name,
            "options": options,
        }
        return DistNadam(num_workers=WORKERS, backend="ray", **how, **self.settings)  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, Any]:
        """What is computed, the same with and without faults."""
        found: dict[str, Any] = {"clipnorm": self.clipnorm, "clocks": self.clocks}
        if self.clocks == "tensor":
            found["groups"] = GROUPS
        return found | (SCALED if self.scaled else {})


class Nodes:
    """A Ray of several nodes on this machine; all but the head may be killed, and are then
    replaced.
    """

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        soon = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
        }
        how = {"num_cpus": 2, "object_store_memory": 150 * 2**20, "include_dashboard": False}
        self._how = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
        config = soon | {"health_check_failure_threshold": 2}
        self._cluster = Cluster(
            initialize_head=True, head_node_args=how | {"_system_config": config}
        )
        self._others = [self._cluster.add_node(**self._how) for _ in range(count - 1)]
        ray.init(address=self._cluster.address, log_to_driver=False)

    def kill_one(self) -> float:
        """Kill a node with all that lives on it, then add another; return when it was killed."""
        moment = time.monotonic()
        self._cluster.remove_node(self._others.pop(), allow_graceful=False)
        self._others.append(self._cluster.add_node(**self._how))
        return moment

    def close(self) -> None:
        """End every node."""
        ray.shutdown()
        self._cluster.shutdown()


@dataclass
class Scene:
    """One case under way."""

    case: Case
    directory: Path
    optimizer: DistNadam
    board: Progress
    crowd: Crowd
    name: str | None = None
    driver: subprocess.Popen[str] | None = None
    nodes: "Nodes | None" = None

    @property
    def _backend(self) -> RayBackend:
        backend = self.optimizer.shards.backend
        assert isinstance(backend, RayBackend)
        return backend

    @property
    def _supervisor(self) -> RaySupervisorClient:
        return self._backend.supervisor

    def supervisor(self) -> Process:
        """Return the supervisor's process; wait for a named one that died."""
        pid = int(self._supervisor.about()["pid"])
        return Process(pid, process_start_time(pid))

    @property
    def num_shards(self) -> int:
        """How many shards there are now."""
        return len(self._supervisor.status().shards)

    def shards(self) -> dict[int, Process]:
        """Return the shards' processes by index, once the supervisor knows all of them."""
        while True:
            known = self._supervisor.status().shards
            if all(at.pid for at in known.values()):
                return {index: Process(at.pid, at.born) for index, at in known.items()}
            time.sleep(0.01)

    def standbys(self) -> dict[int, Process]:
        """Return the standbys' processes, filled or not, by index."""
        known = self._supervisor.status().standbys
        return {index: Process(at.pid, at.born) for index, at in known.items()}

    def await_standbys(self) -> None:
        """Wait until every shard has a standby that follows it."""
        deadline = time.monotonic() + PATIENCE_S
        while self.case.replicas:
            status = described(self.optimizer)
            if all(answer.replicated is not None for answer in status):
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"hung: the standbys are not filled: {status}")
            time.sleep(0.02)

    def await_step(self, since: float) -> float:
        """Wait for a step that began after a moment and return when it ended."""
        deadline = time.monotonic() + PATIENCE_S
        while (ended := self.board.stepped_since(since)) is None:
            if self.crowd.failures:
                raise self.crowd.failures[0]
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"hung: no step in {PATIENCE_S:g} s after a fault at round {self.board.round}: "
                    f"{self._diagnosis()}"
                )
            time.sleep(0.001)
        return ended

    @contextmanager
    def away(self, rank: int) -> Iterator[float]:
        """Have a rank's worker die and leave; at the end another joins."""
        victim = self.crowd.keep_away(rank)
        moment = time.monotonic()
        victim.signal(signal.SIGKILL)
        self._await_members(lambda members: rank not in members)
        yield moment
        self.crowd.replace(rank)
        self._await_members(lambda members: rank in members)

    def _await_members(self, met: Callable[[Sequence[int]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not met(described(self.optimizer)[0].members):
            if time.monotonic() > deadline:
                raise AssertionError(f"hung: the members stay as they are: {self._diagnosis()}")
            time.sleep(0.02)

    def counts(self) -> dict[str, int]:
        """Return what the present supervisor has recovered from."""
        return self._supervisor.status().recoveries

    @contextmanager
    def beside(self, work: Callable[[], None]) -> Iterator[None]:
        """Have work done in another thread meanwhile."""
        thread = threading.Thread(target=work)
        thread.start()
        yield
        thread.join()

    def connect_from_a_new_process(self) -> None:
        """Have a new process connect to the optimizer and ask where it stands."""
        assert self.name is not None
        printed, _ = _start_driver(self.name).communicate(timeout=PATIENCE_S)
        assert printed.startswith("round "), printed

    def _diagnosis(self) -> str:
        try:
            self._backend.transport.refresh()
            asked = [actor.send.remote(Describe()) for actor in self._backend.actors]
            return str(ray.get(asked, timeout=5))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _start_driver(*args: str) -> "subprocess.Popen[str]":
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.driver", address, *args],
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def stage(case: Case, directory: Path, name: str, nodes: Nodes | None = None) -> Iterator[Scene]:
    """Build an optimizer and its trainers; close everything at the end. A named one is built by
    another process, which may be killed.
    """
    board, driver = str(directory / "board"), None
    if case.named:
        driver = _start_driver(name, str(directory / "checkpoints"), json.dumps(asdict(case)))
        assert driver.stdout is not None
        printed = driver.stdout.readline()
        assert printed.startswith("built"), printed
        optimizer = DistNadam.connect(name)
    else:
        optimizer = case.optimizer(directory / "checkpoints", None).build(params())
    try:
        scene = Scene(
            case,
            directory,
            optimizer,
            Progress(board),
            Crowd(optimizer, board),
            name if case.named else None,
            driver,
            nodes,
        )
        try:
            yield scene
        finally:
            scene.crowd.close()
    finally:
        optimizer.shards.backend.close(destroy=True)  # also where its driver is dead
        if driver is not None:
            driver.kill()
            driver.communicate()


def described(optimizer: DistNadam) -> list[Description]:
    """Return what every shard says of itself."""
    return optimizer.shards.describe_all()


def undisturbed(case: Case, rounds: int, schedule: MembershipHistory) -> DistNadam:
    """Return a local optimizer after so many rounds without a fault, of those members; the caller
    closes it.
    """
    optimizer = DistNadam(
        num_workers=WORKERS,
        backend="local",
        **case.settings,
    ).build(params())
    config = optimizer.get_config()
    workers = [optimizer.worker(rank) for rank in range(WORKERS)]
    optimizer.shards.ask({0: Reconfigure(epoch=2, schedule=schedule)})
    for step in range(rounds):
        present = [workers[rank] for rank in members_of(schedule, step + 1)]
        trees = [worker.pull() for worker in present]
        for ticket in [
            worker.push(**contribute(worker, tree, step, config))
            for worker, tree in zip(present, trees, strict=True)
        ]:
            ticket.result()
    return optimizer


def members_of(schedule: MembershipHistory, number: int) -> Sequence[int]:
    """Return the ranks that a round needed."""
    return next(ranks for first, ranks in reversed(schedule) if first <= number)


def ledgers(optimizer: DistNadam) -> list[dict[str, Any]]:
    """Return every shard's ledger."""
    shards = optimizer.shards

    def pause() -> dict[int, Any]:
        return shards.ask(dict.fromkeys(range(len(shards.ranges)), Pause("audit")))

    held = shards.recovering(pause)
    shards.ask(dict.fromkeys(held, Resume("audit")))
    return [held[index].ledger for index in sorted(held)]
