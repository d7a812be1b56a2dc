"""A push that some shards have dropped and others hold, have counted, or are yet to get: it counts
everywhere, or nowhere.

A push is dropped where nobody took a dead rank over, or where the learning-rate function raised.
"""

from collections import deque
from typing import Any

import numpy as np
import pytest

from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options
from distnadam.errors import ConfigError, DistNadamError, StepTimeout, WorkerLost
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Pause, Step
from distnadam.tensors.arrays import cut_flat
from distnadam.worker import Worker
from tests.reference import state_of
from tests.simulation.backend import WorldBackend, begin_world

SIZE = 3000
INITIAL = np.linspace(-1, 1, SIZE, dtype=np.float32)


CASES = pytest.mark.parametrize(
    ("objects", "clip"),
    [(False, {}), (True, {}), (True, {"clipnorm": 1e6}), (True, {"global_clipnorm": 1e6})],
)


class Scene:
    """Two shards, two ranks, and what each shard's first moments come to."""

    def __init__(self, *, objects: bool = True, **config: Any) -> None:
        self.options = Options(
            on_nonfinite="skip",
            step_timeout_s=0.0,
            shard_timeout_s=1e-9,
            rejoin_timeout_s=0.0,
            kernel="numpy",
        )
        self.world, self.layout = begin_world(
            INITIAL, NadamConfig(**config), self.options, 2, 2, 0, objects=objects
        )
        self.workers = [self.worker(rank) for rank in range(2)]

    def controller(self) -> ShardGroup:
        return ShardGroup(WorldBackend(self.world), self.layout, self.options, poll_s=0.0)

    def worker(self, rank: int) -> Worker:
        return Worker(self.controller(), rank)

    def push(self, rank: int, value: float) -> Any:
        self.workers[rank].pull()
        return self.workers[rank].push({"w": np.full(SIZE, value, np.float32)})

    def lose_rank_1(self, faults: list[str]) -> None:
        """Have rank 1 die for good, of which the shards hear or not."""
        self.world.kill_worker(1, self.workers[1].session.incarnation)
        self.world.faults = deque(faults * 50)
        self.world.look()
        self.world.faults.clear()
        self.world.rested()

    def take_over_rank_1(self) -> None:
        self.workers[1] = self.worker(1)

    def wait_for(self, *tickets: Any) -> list[Any]:
        """Wait for tickets by turns, since here each does its part only while it is waited for;
        return rounds or errors.
        """
        found: dict[int, Any] = {}
        for _ in range(6):
            for index, ticket in enumerate(tickets):
                self.world.rested()
                try:
                    found[index] = ticket.result()
                except StepTimeout:
                    continue
                except DistNadamError as error:
                    found[index] = error
        return [found[index] for index in range(len(tickets))]

    def require_mean_of(self, *values: float) -> None:
        for process in self.world.shards:
            assert np.allclose(state_of(process.host).m, 0.1 * sum(values) / len(values))


@CASES
@pytest.mark.parametrize("faults", [["", "lose"], ["lose", ""], [""]])
def test_another_gradient_counts_alone_whichever_shards_had_dropped_the_first(
    faults: list[str], objects: bool, clip: Any
) -> None:
    scene = Scene(objects=objects, **clip)
    first = scene.push(0, 1.0)
    scene.lose_rank_1(faults)
    with pytest.raises(
        WorkerLost, match="worker 1 died before it pushed for round 1 and nobody took it over"
    ):
        first.result()
    scene.take_over_rank_1()
    assert scene.wait_for(scene.push(0, 5.0), scene.push(1, 3.0)) == [1, 1]
    scene.require_mean_of(5.0, 3.0)


@CASES
def test_a_push_that_one_shard_has_counted_counts_on_the_one_that_dropped_it(
    objects: bool, clip: Any
) -> None:
    scene = Scene(objects=objects, **clip)
    first = scene.push(0, 1.0)
    scene.lose_rank_1(["", "lose"])
    scene.take_over_rank_1()
    assert scene.wait_for(scene.push(1, 3.0), first) == [1, 1]
    scene.require_mean_of(1.0, 3.0)


@CASES
def test_a_complaint_that_one_shard_has_counted_skips_the_round_on_the_one_that_dropped_it(
    objects: bool, clip: Any
) -> None:
    scene = Scene(objects=objects, **clip)
    first = scene.push(0, np.nan)
    scene.lose_rank_1(["", "lose"])
    scene.take_over_rank_1()
    assert scene.wait_for(scene.push(1, 3.0), first) == [0, 0], "a skipped round is no iteration"
    ledgers = [
        process.host.shard.members.ledger.to_dict()["runs"]
        for process in scene.world.shards
        if process.host
    ]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0]) == 2, "both ranks were counted in the one round"


@pytest.mark.parametrize("already", [False, True])
def test_a_late_copy_of_a_dropped_push_counts_nowhere(already: bool) -> None:
    scene = Scene()
    scene.world.faults = deque(["", "delay"])
    first = scene.push(0, 1.0)
    scene.lose_rank_1([""])
    assert isinstance(scene.wait_for(first)[0], WorkerLost)
    scene.take_over_rank_1()
    second = scene.push(0, 5.0) if already else None
    scene.world.deliver_one(0)
    assert scene.wait_for(second or scene.push(0, 5.0), scene.push(1, 3.0)) == [1, 1]
    scene.require_mean_of(5.0, 3.0)


@pytest.mark.parametrize("clip", [{}, {"global_clipnorm": 1e6}])
def test_every_worker_hears_why_no_step_can_be_made_and_another_gradient_counts_alone(
    clip: Any,
) -> None:
    def no_rate(step: int) -> float:
        raise RuntimeError("no rate")

    scene = Scene(lr=no_rate, **clip)
    tickets = [scene.push(0, 1.0), scene.push(1, 2.0)]
    assert [str(error) for error in scene.wait_for(*tickets)] == [
        "lr at step 0: the schedule raised RuntimeError: no rate"
    ] * 2
    scene.controller().set_config({"lr": 0.001})
    assert scene.wait_for(scene.push(0, 5.0), scene.push(1, 3.0)) == [1, 1]
    scene.require_mean_of(5.0, 3.0)


def test_norms_of_a_dropped_round_clip_no_step_from_outside() -> None:
    def no_rate(step: int) -> float:
        raise RuntimeError("no rate")

    scene = Scene(lr=no_rate, global_clipnorm=0.5)
    tickets = [scene.push(0, 1.0), scene.push(1, 1.0)]
    assert isinstance(scene.wait_for(tickets[0])[0], ConfigError)
    scene.controller().set_config({"lr": 0.001})
    process = scene.world.shards[0]
    process.send(Pause("outside")).result(0)
    gradients = cut_flat({"float32": np.full(SIZE, 100.0, np.float32)}, process.spec.ranges)
    process.send(Step(token="outside", incarnation=1, round=1, gradients=gradients))
    while process.work():
        pass
    assert isinstance(scene.wait_for(tickets[1])[0], ConfigError)
    assert not process.work(), "it still awaits its own norms"
    assert process.host is not None
    assert process.host.shard.progress.round == 0
