"""A push that some shards have dropped, when nobody took a dead rank over, and others hold yet: it counts everywhere, or nowhere."""

from collections import deque
from typing import Any

import numpy as np
import pytest

from distnadam import seat
from distnadam.config import NadamConfig, Options
from distnadam.controller import Controller
from distnadam.errors import StepTimeout, WorkerLost
from distnadam.worker import Worker
from tests.one_process import state_of
from tests.world import World
from tests.world_backend import WorldBackend, begin_world

SIZE = 3000
INITIAL = np.linspace(-1, 1, SIZE, dtype=np.float32)


@pytest.fixture(autouse=True)
def _nobody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "_POLL_S", 0.0)


class Scene:
    """Two shards, two ranks; rank 1 has died, which shard 0 alone knows to be for good, and rank 0 waits with its first push."""

    def __init__(self, *, objects: bool, clip: dict[str, float]) -> None:
        self.options = Options(step_timeout_s=0.0, shard_timeout_s=1e-9, rejoin_timeout_s=0.0, kernel="numpy")
        self.world, self.layout = begin_world(INITIAL, NadamConfig(**clip), self.options, 2, 2, 0, objects=objects)
        self.first, second = self.worker(0), self.worker(1)
        self.waits = self.push(self.first, 1.0)
        self.world.kill_worker(1, second._seat._incarnation)
        self.world.faults = deque(["", "lose"] * 50)
        self.world.look()
        self.world.faults.clear()
        self.world.rested()

    def worker(self, rank: int) -> Worker:
        return Worker(Controller(WorldBackend(self.world), self.layout, 2, self.options), rank)

    def push(self, worker: Worker, value: float) -> Any:
        worker.pull()
        return worker.push({"w": np.full(SIZE, value, np.float32)})


def moments(world: World) -> set[float]:
    return {float(value) for process in world.shards for value in state_of(process.host).m}


CASES = pytest.mark.parametrize(("objects", "clip"), [(False, {}), (True, {}), (True, {"clipnorm": 1e6}), (True, {"global_clipnorm": 1e6})])


@CASES
def test_a_push_that_one_shard_holds_counts_on_the_one_that_dropped_it_too(objects: bool, clip: dict[str, float]) -> None:
    scene = Scene(objects=objects, clip=clip)
    with pytest.raises(StepTimeout, match="worker 0: round 1 was not decided"):
        scene.waits.result()
    with pytest.raises(StepTimeout):
        scene.first.push({"w": np.full(SIZE, 5.0, np.float32)})
    successor = scene.push(scene.worker(1), 3.0)
    for _ in range(4):  # each does its part while the other is waited for
        for ticket in (scene.waits, successor):
            try:
                ticket.result()
            except StepTimeout:
                continue
    assert (scene.waits.result(), successor.result()) == (1, 1)
    assert len(moments(scene.world)) == 1
    assert np.isclose(moments(scene.world).pop(), 0.1 * (1.0 + 3.0) / 2)


@CASES
def test_a_push_that_all_have_dropped_is_told_so_and_another_counts_alone(objects: bool, clip: dict[str, float]) -> None:
    scene = Scene(objects=objects, clip=clip)
    scene.world.look()  # the other shard is told
    with pytest.raises(WorkerLost, match="worker 1 died before it pushed for round 1 and nobody took it over"):
        scene.waits.result()
    second = scene.worker(1)
    tickets = [scene.push(scene.first, 5.0), scene.push(second, 3.0)]
    for _ in range(4):
        for ticket in tickets:
            try:
                ticket.result()
            except StepTimeout:
                continue
    assert [ticket.result() for ticket in tickets] == [1, 1]
    assert len(moments(scene.world)) == 1
    assert np.isclose(moments(scene.world).pop(), 0.1 * (5.0 + 3.0) / 2)
