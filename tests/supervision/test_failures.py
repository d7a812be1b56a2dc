"""An error inside the supervisor reaches every client by name, and its thread goes on."""

import numpy as np
import pytest
from typing_extensions import override

from distnadam.config import Options
from distnadam.errors import Unrecoverable
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import ShardSpec
from distnadam.supervision.events import ProcessDied, StandbyStarted
from distnadam.supervision.process_manager import ShardProcess
from distnadam.supervision.shard_map import require_alive
from distnadam.supervision.supervisor import Supervisor
from distnadam.tensors.layout import Layout
from tests.simulation.world import World, WorldProcesses

ANSWER_S = 10.0
LAYOUT = Layout.of({"w": np.ones(10, np.float32)})
SPEC = ShardSpec(
    index=0,
    num_shards=1,
    num_workers=1,
    replicas=0,
    name=None,
    config=NadamConfig(),
    options=Options(shard_timeout_s=1.0),
    layout=LAYOUT,
    ranges=LAYOUT.cuts(1)[0],
)


class Failing(WorldProcesses):
    """Processes of which the manager cannot watch or fence any."""

    watches = False

    @override
    def watch(self, process: ShardProcess) -> None:
        if self.watches:
            raise RuntimeError("Ray's head does not answer")

    @override
    def fence(self, process: ShardProcess) -> None:
        raise RuntimeError("Ray's head does not answer")


def watching() -> tuple[Supervisor, Failing]:
    """Return a supervisor that watches one shard in a thread of its own."""
    processes = Failing(World([SPEC], replicas=0))
    supervisor = Supervisor([SPEC], 0, processes)
    supervisor.manage([processes.start(SPEC, standby=False, near=[])], {})
    supervisor.begin(initial=None, checkpoint=None)
    return supervisor, processes


def test_an_event_that_cannot_be_handled_fails_clients_and_the_thread_goes_on() -> None:
    supervisor, processes = watching()
    version = supervisor.newest_map.version
    processes.watches = True
    standby = processes.start(SPEC, standby=True, near=[])
    supervisor.notify(StandbyStarted(layout_generation=0, index=0, process=standby))
    for _ in range(2):
        shard_map = supervisor.shard_map(version, suspect=True).result(ANSWER_S)
        with pytest.raises(Unrecoverable, match="could not handle StandbyStarted: RuntimeError"):
            require_alive(shard_map)
    with pytest.raises(Unrecoverable, match="could not handle StandbyStarted"):
        supervisor.reshard(LAYOUT.cuts(2)).result(ANSWER_S)


def test_a_decision_that_cannot_be_executed_fails_clients_by_name() -> None:
    supervisor, _ = watching()
    version = supervisor.newest_map.version
    supervisor.notify(ProcessDied(process=supervisor.cluster.shards[0]))
    shard_map = supervisor.shard_map(version, suspect=True).result(ANSWER_S)
    with pytest.raises(Unrecoverable, match="could not recover: RuntimeError: Ray's head"):
        require_alive(shard_map)
