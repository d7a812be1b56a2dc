"""What a supervisor learns of ranks and processes, and what it takes for granted no more."""

from typing import Any

import numpy as np
import pytest

from distnadam.config import Options
from distnadam.errors import IllegalMessage, ShardLost, StepTimeout
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Description, ShardSpec
from distnadam.shard.phases import Phase
from distnadam.supervision.cluster_state import ClusterState, owners
from distnadam.supervision.process_manager import ShardProcess
from distnadam.tensors.layout import Layout
from tests.simulation.world import World

LAYOUT = Layout.of({"w": np.ones(5000, np.float32)})
SPECS = [
    ShardSpec(
        index=index,
        num_shards=2,
        num_workers=2,
        replicas=0,
        name=None,
        config=NadamConfig(),
        options=Options(),
        layout=LAYOUT,
        ranges=ranges,
    )
    for index, ranges in enumerate(LAYOUT.cuts(2))
]


def seen(**how: Any) -> Description:
    """A shard's description, with what a test says of it."""
    plain: dict[str, Any] = {
        "spec": None,
        "epoch": 1,
        "round": 3,
        "iterations": 3,
        "skipped": 0,
        "phase": Phase.COLLECTING.value,
        "waiting_for": (),
        "left": (),
        "dead": (),
        "members": (0, 1),
        "holder": None,
        "busy": False,
        "config": NadamConfig(),
        "revision": 0,
        "applied_revision": 0,
    }
    return Description(**(plain | how))


@pytest.fixture
def cluster() -> ClusterState:
    now = iter(range(1000))
    cluster = ClusterState(SPECS, World(SPECS, replicas=0).processes, lambda: float(next(now)))
    cluster.shards = [ShardProcess(index, f"shard {index}", None) for index in range(2)]
    return cluster


@pytest.mark.parametrize(
    ("answer", "dead"),
    [
        (ShardLost("its process died"), True),
        (StepTimeout("it is silent"), True),
        (seen(phase=Phase.BROKEN.value), True),
        (IllegalMessage("it refuses"), False),
        (seen(), False),
    ],
    ids=["lost", "silent", "broken", "refusing", "well"],
)
def test_shards_that_died_broke_or_are_silent_count_as_dead(
    cluster: ClusterState, answer: Any, dead: bool
) -> None:
    cluster.learn({0: answer, 1: seen()})
    assert cluster.missing() == ((0,) if dead else ())
    assert cluster.alive().keys() == ({1} if dead else {0, 1})


def test_the_newest_epoch_brings_the_membership_and_a_later_one_is_free(
    cluster: ClusterState,
) -> None:
    new = ((1, (0, 1)), (4, (0,)))
    cluster.learn({0: seen(epoch=5, schedule=new), 1: seen(epoch=4, schedule=((1, (0, 1)),))})
    assert (cluster.epoch, cluster.schedule) == (5, new)
    assert cluster.next_epoch() == 6


def test_a_worker_is_dead_until_a_newer_one_has_its_rank(cluster: ClusterState) -> None:
    cluster.worker_joined(1, 4)
    cluster.worker_died(1, 4)
    cluster.worker_died(1, 4)  # another shard reports it too
    assert cluster.lost_ranks == {1: 4}
    assert cluster.dead_ranks[1].since == 0.0
    assert not cluster.worker_joined(1, 4)
    assert cluster.worker_joined(1, 5)
    assert cluster.lost_ranks == {}
    cluster.worker_died(1, 4)  # late: somebody has the rank
    assert cluster.lost_ranks == {}


def test_a_death_that_only_shards_know_is_learned_and_a_takeover_too(
    cluster: ClusterState,
) -> None:
    cluster.learn({0: seen(dead=(1,), newest={1: 4}), 1: seen(newest={1: 4})})
    assert cluster.lost_ranks == {1: 4}
    # finishing it gave the next incarnation away, under which nobody works
    cluster.learn({0: seen(dead=(1,), newest={1: 5}), 1: seen(newest={1: 5})})
    assert cluster.lost_ranks == {1: 4}
    cluster.learn({0: seen(newest={1: 6}, live_owners={1: (6, "token")}), 1: seen()})
    assert cluster.lost_ranks == {}


def test_a_departed_worker_needs_no_finishing(cluster: ClusterState) -> None:
    cluster.worker_joined(0, 2)
    cluster.worker_left(0, 1)
    assert cluster.lost_ranks == {}
    cluster.worker_left(0, 2)
    assert cluster.dead_ranks[0].finished
    cluster.worker_joined(1, 1)
    cluster.worker_died(1, 1)
    assert not cluster.dead_ranks[1].finished
    cluster.worker_finished(1)
    assert cluster.dead_ranks[1].finished


def test_a_successor_steps_in_the_place_of_a_standby_however_that_goes(
    cluster: ClusterState,
) -> None:
    standby, successor, another = (ShardProcess(0, name, None) for name in ("a", "b", "c"))
    cluster.add_standby(standby)
    cluster.add_standby(successor)
    assert (cluster.standbys, cluster.successors) == ({0: standby}, {0: successor})
    cluster.process_died(successor)
    assert (cluster.standbys, cluster.successors) == ({0: standby}, {})
    cluster.add_standby(another)
    cluster.drop_standby(standby)
    assert (cluster.standbys, cluster.successors) == ({0: another}, {})


def test_what_is_known_of_processes_that_are_gone_goes_with_them(cluster: ClusterState) -> None:
    """A handle of an actor has Ray keep what it has of it."""
    gone, standby = ShardProcess(0, "gone", None), ShardProcess(0, "standby", None)
    cluster.add_standby(standby)
    some = (cluster.dead, cluster.fenced, cluster.stale, cluster.unfilled)
    for known in some:
        known.update([gone, standby, cluster.shards[1]])
    cluster.forget_gone()
    assert all(known == {standby, cluster.shards[1]} for known in some)


def test_a_dead_standby_is_forgotten_and_a_dead_shard_is_missing(cluster: ClusterState) -> None:
    standby = ShardProcess(0, "standby", None)
    cluster.standbys = {0: standby}
    cluster.process_died(standby)
    assert cluster.standbys == {} and cluster.missing() == ()
    cluster.process_died(cluster.shards[1])
    assert cluster.missing() == (1,)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ([seen(live_owners={0: (1, "a")}, newest={0: 1}), seen()], {0: (1, "a")}),
        ([seen(live_owners={0: (1, "a")}, newest={0: 1}), seen(newest={0: 2})], {}),
        ([seen(live_owners={0: (1, "a")}, newest={0: 1}), seen(newest={0: 1}, left=(0,))], {}),
        ([seen(live_owners={0: (1, "a")}, newest={0: 1}), seen(newest={0: 1}, dead=(0,))], {}),
        (
            [seen(live_owners={0: (2, "b")}, newest={0: 2}), seen(newest={0: 1}, dead=(0,))],
            {0: (2, "b")},
        ),
    ],
    ids=["one shard knows", "another knows a newer", "it left", "it died", "its predecessor died"],
)
def test_a_rank_has_an_owner_if_any_shard_knows_it_and_none_knows_better(
    described: list[Description], expected: dict[int, tuple[int, str]]
) -> None:
    assert owners(described) == expected
