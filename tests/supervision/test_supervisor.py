"""What a supervisor decides over time, in the simulation: a recorded membership is replayed, and a
successor knows the ranks.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options
from distnadam.errors import LatePush, StaleEpoch, StepTimeout, SupersededWorker
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import ShardSpec
from distnadam.tensors.layout import Layout
from distnadam.worker import Worker
from tests.reference import history_of
from tests.simulation.backend import WorldBackend
from tests.simulation.world import World

RANKS, SIZE = 3, 300
LAYOUT = Layout.of({"w": np.ones(SIZE, np.float32)})
ELASTIC = Options(step_timeout_s=0.0, kernel="numpy", min_workers=1, rejoin_timeout_s=0.0)


class Training:
    """Ranks that train in a world of two shards."""

    def __init__(self, options: Options = ELASTIC, num_shards: int = 2) -> None:
        cuts = LAYOUT.cuts(num_shards)
        specs = [
            ShardSpec(
                index=i,
                num_shards=num_shards,
                num_workers=RANKS,
                replicas=0,
                name=None,
                config=NadamConfig(),
                options=options,
                layout=LAYOUT,
                ranges=cut,
            )
            for i, cut in enumerate(cuts)
        ]
        self.world, self.options = World(specs, replicas=0), options
        self.controller().load({"float32": np.ones(SIZE, np.float32)})
        self.world.look()
        self.workers: dict[int, Worker] = {}
        for rank in range(RANKS):
            self.join(rank)

    def controller(self) -> ShardGroup:
        return ShardGroup(WorldBackend(self.world), LAYOUT, self.options, poll_s=0.0)

    def join(self, rank: int) -> None:
        """Have a new worker take the rank, once it is admitted."""
        for _ in range(10):
            self.world.rested()
            try:
                self.workers[rank] = Worker(self.controller(), rank)
                return
            except StepTimeout:
                self.world.look()
        raise AssertionError(f"rank {rank} was not admitted")

    def die(self, rank: int) -> None:
        self.world.kill_worker(rank, self.workers.pop(rank).session.incarnation)
        self.world.look()

    def train(self, end: int) -> None:
        """Have all that are there push until so many rounds are decided."""
        for _ in range(100):
            if all(
                process.host and process.host.shard.progress.round >= end
                for process in self.world.shards
            ):
                return
            tickets = []
            for rank, worker in list(self.workers.items()):
                self.world.rested()
                try:
                    worker.pull()
                    tickets.append(worker.push({"w": np.full(SIZE, rank + 1, np.float32)}))
                except SupersededWorker:
                    del self.workers[rank]
                except (StaleEpoch, LatePush, StepTimeout):
                    continue
            for ticket in tickets:
                self.world.rested()
                try:
                    ticket.result()
                except (StaleEpoch, LatePush, StepTimeout):
                    continue
            self.world.look()
        raise AssertionError(f"round {end} was not reached")

    def members(self) -> list[Sequence[int]]:
        """Who was counted in each round."""
        shard = self.world.shards[0].host.shard  # type: ignore[union-attr]
        return [
            [rank for rank, _ in counted]
            for counted in history_of(shard.members.ledger.to_dict(), shard.progress.round)
        ]


def test_a_rewind_replays_the_membership_of_every_round() -> None:
    training = Training()
    training.train(3)
    training.die(1)
    training.train(6)
    training.join(1)
    training.train(10)
    before = training.members()
    assert [1 in ranks for ranks in before] == [True] * 3 + [False] * 3 + [True] * 4
    training.world.shards[0].kill()
    training.world.look()
    assert all(process.host.shard.progress.round == 0 for process in training.world.shards)  # type: ignore[union-attr]
    training.train(12)
    assert training.members()[:10] == before


def test_a_successor_admits_who_asked_its_predecessor_and_knows_the_dead() -> None:
    training = Training()
    training.train(2)
    training.die(1)
    training.train(4)
    with pytest.raises(StepTimeout, match="was not admitted"):
        Worker(training.controller(), 1)
    training.world.replace_supervisor()
    training.world.look()
    training.join(1)
    training.die(2)
    training.world.replace_supervisor()
    training.world.look()
    training.train(6)
    assert [list(ranks) for ranks in training.members()] == [[0, 1, 2]] * 2 + [[0, 2]] * 2 + [
        [0, 1]
    ] * 2
