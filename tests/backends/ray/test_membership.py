"""Workers that leave and come back on a real Ray, and calls of Ray that fail: the mean over those
present, each push once.
"""

import json
import os
import signal
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from distnadam import DistNadam, Options
from distnadam.errors import StaleEpoch, WorkerLost
from tests.models import bits

pytestmark = pytest.mark.usefixtures("ray_cluster")
SIZE = 3000
START = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32)}


def gradient(number: int, rank: int) -> Any:
    return {"w": np.random.default_rng([number, rank]).standard_normal(SIZE).astype(np.float32)}


@ray.remote(num_cpus=0)
class Trainer:
    """One rank in a process of its own."""

    def __init__(self, optimizer: DistNadam, rank: int) -> None:
        self.rank, self.worker = rank, optimizer.worker(rank)

    def pid(self) -> int:
        return os.getpid()

    def train(self, end: int) -> int:
        while self.worker.round < end:
            try:
                self.worker.step(gradient(self.worker.round, self.rank))
            except StaleEpoch:
                self.worker.pull()
        return self.worker.round


def replayed(members_of: list[tuple[int, ...]]) -> list[bytes]:
    """The bits of one process that averages these ranks' gradients, round by round."""
    with DistNadam(backend="local").build(START) as optimizer:
        for number, ranks in enumerate(members_of):
            total = sum(
                (gradient(number, rank)["w"] for rank in ranks[1:]), gradient(number, ranks[0])["w"]
            )
            optimizer.apply_gradients({"w": total / np.float32(len(ranks))})
        return bits(optimizer)


def recorded(optimizer: DistNadam) -> list[tuple[int, ...]]:
    """The ranks that the ledger says were counted in each round."""
    with optimizer.shards.boundary() as at:
        runs, last = at.held.ledger["runs"], at.held.round
    return [
        tuple(sorted({rank for rank, _, first, end in runs if first <= number <= end}))
        for number in range(1, last + 1)
    ]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "transport", ["auto", pytest.param("objects", marks=pytest.mark.nightly)]
)  # objects have no line whose end would tell of a death
def test_a_worker_that_leaves_and_comes_back_replays_to_the_same_bits(
    transport: Any,
) -> None:
    options = Options(min_workers=1, rejoin_timeout_s=0.5, transport=transport)
    with DistNadam(num_shards=2, num_workers=2, backend="ray", options=options).build(
        START
    ) as optimizer:
        first, second = (Trainer.remote(optimizer, rank) for rank in range(2))
        assert ray.get([first.train.remote(10), second.train.remote(10)]) == [10, 10]
        os.kill(ray.get(second.pid.remote()), signal.SIGKILL)
        assert ray.get(first.train.remote(20)) == 20
        successor = Trainer.remote(optimizer, 1)
        ray.get(successor.pid.remote())  # it is a member again
        both = [first.train.remote(40), successor.train.remote(40)]
        assert ray.get(both) == [40, 40]
        members = recorded(optimizer)
        assert members[:10] == [(0, 1)] * 10
        assert members[10:20] == [(0,)] * 10
        assert members[-1] == (0, 1)
        assert bits(optimizer) == replayed(members)


@pytest.mark.nightly
@pytest.mark.parametrize("transport", ["auto", pytest.param("objects", marks=pytest.mark.nightly)])
def test_waiting_ranks_learn_who_is_lost_where_all_are_needed(transport: Any) -> None:
    options = Options(rejoin_timeout_s=0.2, transport=transport)
    with DistNadam(num_shards=2, num_workers=2, backend="ray", options=options).build(
        START
    ) as optimizer:
        first, second = (Trainer.remote(optimizer, rank) for rank in range(2))
        ray.get([first.train.remote(3), second.train.remote(3)])
        os.kill(ray.get(second.pid.remote()), signal.SIGKILL)
        with pytest.raises(RayTaskError) as caught:
            ray.get(first.train.remote(4))
        assert isinstance(caught.value.cause, WorkerLost)
        assert "worker 1 died before it pushed for round 4 and nobody took it over" in str(
            caught.value.cause
        )
        successor = Trainer.remote(optimizer, 1)
        ray.get(successor.pid.remote())  # it has taken the rank over
        assert ray.get([first.train.remote(6), successor.train.remote(6)]) == [6, 6]
        assert bits(optimizer) == replayed([(0, 1)] * 6)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_calls_that_fail_before_or_after_they_ran_change_no_bit() -> None:
    """Ray itself lets a third of each trainer's calls fail, half of those before they ran and half
    after, until ten have failed.
    """
    rule = {
        "num_failures": 10,
        "req_failure_prob": 17,
        "resp_failure_prob": 17,
        "in_flight_failure_prob": 0,
    }
    failing = {
        "env_vars": {
            "RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": rule})
        }
    }
    options = Options(transport="objects", step_timeout_s=60.0)
    with DistNadam(num_shards=2, num_workers=2, backend="ray", options=options).build(
        START
    ) as optimizer:
        trainers = [
            Trainer.options(runtime_env=failing).remote(optimizer, rank) for rank in range(2)
        ]
        assert ray.get([trainer.train.remote(30) for trainer in trainers]) == [30, 30]
        assert bits(optimizer) == replayed([(0, 1)] * 30)
