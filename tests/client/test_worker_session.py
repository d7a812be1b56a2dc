"""A worker's session with the shards of a simulated world: the states of a push, and in sync."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from distnadam.client.in_flight_push import InFlightPush, PushState
from distnadam.client.shard_group import ShardGroup
from distnadam.client.worker_session import WorkerSession
from distnadam.config import Options
from distnadam.errors import NonFiniteGradient, Rewound, StepTimeout
from distnadam.hyperparameters import NadamConfig
from tests.simulation.backend import WorldBackend, begin_world
from tests.simulation.world import World

PARAMS = np.ones(3000, np.float32)


class Scene:
    """Two shards of a world, and sessions of two ranks."""

    def __init__(self, **config: Any) -> None:
        options = Options(step_timeout_s=0.0, shard_timeout_s=1e-9, kernel="numpy")
        self.world: World
        self.world, layout = begin_world(PARAMS, NadamConfig(**config), options, 2, 2, 0)
        self.received: list[int] = []
        self.group = ShardGroup(WorldBackend(self.world), layout, options, poll_s=0.0)
        self.sessions = [
            WorkerSession(self.group, rank, lambda shard, _: self.received.append(shard))
            for rank in range(2)
        ]

    def push(self, rank: int, value: float = 1.0, rejection: str | None = None) -> InFlightPush:
        session = self.sessions[rank]
        flat = session.channel.gradients
        flat["float32"][:] = value

        def parts(ranges: Any) -> list[Any]:
            return [{s: flat[s][b:e] for s, (b, e) in each.items()} for each in ranges]

        return session.push(parts, rejection, want_parameters=True)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_worker_that_waits_long_says_once_for_whom(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    mine = scene.push(0)
    with pytest.raises(StepTimeout):
        scene.sessions[0].wait_for(mine, 100.0)  # a world without work ends each wait at once
    assert caplog.messages == [
        "worker 0, round 1: has waited 10 s, still to push: ranks 1; it waits on, up to 100 s"
    ]


def test_a_push_is_sent_then_decided_and_its_parameters_are_received(scene: Scene) -> None:
    session = scene.sessions[0]
    assert not session.in_sync
    mine = scene.push(0)
    assert session.in_sync
    assert (mine.state, mine.round, session.in_flight) == (PushState.SENT, 1, mine)
    with pytest.raises(StepTimeout, match="round 1 was not decided"):
        session.wait_for(mine)
    assert session.in_flight is mine, "it may be waited for again"
    scene.push(1)
    assert session.wait_for(mine).iterations == 1
    assert (mine.state, session.in_flight, session.round) == (PushState.DECIDED, None, 1)
    assert scene.received == [0, 1]
    assert session.wait_for(mine) is mine.ended


def test_clipping_takes_a_push_through_measured() -> None:
    scene = Scene(clipnorm=1.0)
    pushes = [scene.push(rank) for rank in range(2)]
    states: list[PushState] = []
    real = scene.sessions[0].channel.post

    class Watched:
        """The answers of the second phase; notes how far the push is when they are awaited."""

        def __init__(self, pending: Any) -> None:
            self._pending = pending

        def result(self, timeout_s: float) -> Any:
            states.append(pushes[0].state)
            return self._pending.result(timeout_s)

    channel = scene.sessions[0].channel
    channel.post = lambda messages: Watched(real(messages))
    assert scene.sessions[0].wait_for(pushes[0]).outcome == "applied"
    assert states == [PushState.MEASURED]
    assert pushes[0].square_sums is not None
    assert pushes[0].state is PushState.DECIDED


def test_a_refused_round_fails_the_push_and_leaves_the_session_in_sync(scene: Scene) -> None:
    mine = scene.push(0, rejection="worker 0: not finite")
    scene.push(1)
    for _ in range(2):
        with pytest.raises(NonFiniteGradient, match=r"round 1 was refused.*not finite"):
            scene.sessions[0].wait_for(mine)
    assert mine.state is PushState.FAILED
    assert scene.sessions[0].in_sync
    assert scene.sessions[0].in_flight is None


def test_a_rewind_fails_the_push_and_the_next_one_looks_again(scene: Scene) -> None:
    session, mine = scene.sessions[0], scene.push(0)
    scene.world.shards[1].kill()
    with pytest.raises(Rewound, match="to round 0"):
        wait(session, mine)
    assert mine.state is PushState.FAILED
    assert not session.in_sync
    again = scene.push(0)
    assert session.in_sync
    assert again.epoch > mine.epoch
    with suppress(Rewound):
        scene.push(1)
    if scene.sessions[1].in_flight is None:
        scene.push(1)
    assert wait(session, again).iterations == 1


def wait(session: WorkerSession, push: InFlightPush) -> Any:
    """Wait through the timeouts of a world in which nobody sleeps."""
    for _ in range(20):
        with suppress(StepTimeout):
            return session.wait_for(push)
    raise AssertionError("it is never decided")


def test_a_rewind_that_the_worker_raised_is_not_raised_again_by_its_handle(scene: Scene) -> None:
    for session in scene.sessions:
        session.pull(want_parameters=False)
    scene.group.read(("params",))
    for process in scene.world.shards:
        process.host.shard.epochs.advance("rewound")
    mine = scene.push(0)
    with pytest.raises(Rewound):
        scene.sessions[0].wait_for(mine)
    scene.group.read(("params",))
