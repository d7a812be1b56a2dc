"""What a supervisor sees over time; looking changes nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distnadam.client.direct_step import DirectStep
from distnadam.config import Options
from distnadam.errors import ClusterError
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Describe, Pause, Resume, ShardSpec
from distnadam.protocol.supervisor_messages import AttachStandby, Load
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.decisions import StartStandbys
from distnadam.supervision.observer import TOKEN, Observer
from distnadam.supervision.policy import Observation, Rules, decide
from distnadam.supervision.restore_points import RestorePoints
from distnadam.tensors.arrays import cut_flat
from distnadam.tensors.layout import Layout
from tests.simulation.world import World

LAYOUT = Layout.of({"w": np.ones(5000, np.float32)})
OPTIONS = Options(kernel="numpy", step_timeout_s=10.0, shard_timeout_s=4.0)
PARAMS = {"float32": np.ones(5000, np.float32)}


class Seen:
    """Two loaded shards, an observer of them, and a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        specs = [
            ShardSpec(
                index=index,
                num_shards=2,
                num_workers=1,
                replicas=1,
                name=None,
                config=NadamConfig(),
                options=OPTIONS,
                layout=LAYOUT,
                ranges=ranges,
            )
            for index, ranges in enumerate(LAYOUT.cuts(2))
        ]
        self.world = World(specs, replicas=0)
        self.cluster = ClusterState(specs, self.world.processes, lambda: self.now)
        self.cluster.shards = list(self.world.supervisor.cluster.shards)
        points = RestorePoints(None, retain_initial=True)
        points.begin(PARAMS, None)
        self.observer = Observer(self.cluster, points, OPTIONS)
        loads = {spec.index: Load(epoch=1, params=cut_flat(PARAMS, spec.ranges)) for spec in specs}
        assert self.cluster.ask(loads) == {0: 0, 1: 0}

    def look(self, after_s: float = 0.0) -> Observation:
        self.now += after_s
        return self.observer.look()


@pytest.fixture
def seen() -> Seen:
    return Seen()


def test_a_dead_shard_is_seen_before_it_is_fenced_and_its_standby_is_asked_only_then(
    seen: Seen,
) -> None:
    cluster, processes = seen.cluster, seen.world.processes
    standby = processes.start(cluster.specs[0], standby=True, near=[])
    cluster.standbys = {0: standby}
    cluster.ask({0: AttachStandby(standby)})
    first = seen.look().shards[0]
    assert (first.alive, first.standby, first.has_standby) == (True, 0, True)
    cluster.shards[0].handle.kill()
    dead = seen.look().shards[0]
    assert (dead.alive, dead.fenced, dead.standby) == (False, False, None)
    cluster.fenced.add(cluster.shards[0])
    fenced = seen.look().shards[0]
    assert (fenced.alive, fenced.fenced, fenced.standby) == (False, True, 0)
    cluster.stale.add(standby)
    stale = seen.look().shards[0]
    assert (stale.standby, stale.stale) == (None, True)


def test_a_hold_expires_after_the_step_timeout_and_looking_does_not_release_it(
    seen: Seen,
) -> None:
    seen.cluster.ask({0: Pause("somebody"), 1: Pause("somebody")})
    first = seen.look()
    assert (first.held, first.expired_hold) == (True, None)
    assert seen.observer.awaits
    assert seen.look(after_s=9.0).held
    for _ in range(2):
        late = seen.look(after_s=2.0)
        assert (late.held, late.expired_hold) == (False, "somebody")
    holders = [answer.holder for answer in seen.cluster.ask_all(Describe()).values()]
    assert holders == ["somebody", "somebody"]


def test_a_hold_by_a_dead_process_expires_at_the_next_look(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(token: str) -> bool:
        return token == "somebody"

    monkeypatch.setattr(seen.world.processes, "is_dead", gone)
    seen.cluster.ask({0: Pause("somebody")})
    assert seen.look().held
    assert seen.look().expired_hold == "somebody"


def test_what_an_earlier_supervisor_paused_expires_at_once(seen: Seen) -> None:
    seen.cluster.ask({0: Pause(TOKEN)})
    assert seen.look().expired_hold == TOKEN


def silence_shard_0(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    ask = seen.world.processes.ask

    def partly(targets: Mapping[int, Any], messages: Any, timeout_s: float) -> dict[int, Any]:
        return {i: answer for i, answer in ask(targets, messages, timeout_s).items() if i}

    patch.setattr(seen.world.processes, "ask", partly)


def test_a_look_that_a_shard_does_not_answer_does_not_lengthen_a_hold(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen.cluster.ask({0: Pause("somebody")})
    assert seen.look().held
    with monkeypatch.context() as silent:
        silence_shard_0(seen, silent)
        assert seen.look(after_s=6.0).held
    assert seen.look(after_s=6.0).expired_hold == "somebody"


def answer_backwards(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    ask = seen.world.processes.ask

    def backwards(targets: Mapping[int, Any], messages: Any, timeout_s: float) -> dict[int, Any]:
        return dict(reversed(ask(targets, messages, timeout_s).items()))

    patch.setattr(seen.world.processes, "ask", backwards)


@pytest.mark.parametrize("disturb", [lambda seen, patch: None, silence_shard_0, answer_backwards])
def test_a_step_that_one_shard_lacks_cannot_complete_after_the_shard_timeout(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, disturb: Any
) -> None:
    zeros = {"float32": np.zeros(5000, np.float32)}
    message = DirectStep(incarnation=1, round=1).message("somebody", zeros, None)
    seen.cluster.ask({0: Pause("somebody"), 1: Pause("somebody")})
    gradients = cut_flat(zeros, LAYOUT.cuts(2)[1])
    assert seen.cluster.ask({1: replace(message, gradients=gradients)})[1].round == 1
    seen.cluster.ask({0: Resume("somebody"), 1: Resume("somebody")})
    assert not seen.look().cannot_complete
    with monkeypatch.context() as patch:
        disturb(seen, patch)
        assert not seen.look(after_s=3.0).cannot_complete
    assert seen.look(after_s=3.0).cannot_complete


def test_a_dead_worker_is_seen_with_its_age_until_it_is_finished(seen: Seen) -> None:
    seen.cluster.worker_joined(0, 3)
    seen.cluster.worker_died(0, 3)
    observation = seen.look(after_s=2.5)
    assert observation.dead == {0: 2.5}
    assert observation.unfinished == {0}
    seen.cluster.worker_finished(0)
    assert seen.look().unfinished == frozenset()


def test_a_shard_that_refuses_to_describe_itself_gets_no_further_standby(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicated = Rules(rejoin_timeout_s=30.0, replicas=1)
    assert decide(seen.look(), replicated) == [StartStandbys((0, 1))]

    def refuse(targets: object, messages: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        return {index: ClusterError(f"shard {index}: a bug") for index in messages}

    monkeypatch.setattr(seen.world.processes, "ask", refuse)
    observation = seen.look()
    assert all(shard.alive for shard in observation.shards)
    assert decide(observation, replicated) == []


def test_a_hold_counts_while_files_are_handled_and_its_seconds_begin_behind_that(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen.cluster.ask({0: Pause("somebody"), 1: Pause("somebody")})
    files = seen.world.shards[0].host.files
    monkeypatch.setattr(type(files), "is_saving", property(lambda self: self is files))
    for _ in range(3):
        busy = seen.look(after_s=20.0)
        assert (busy.held, busy.expired_hold) == (True, None)
    monkeypatch.undo()
    assert seen.look(after_s=9.0).held
    assert seen.look(after_s=2.0).expired_hold == "somebody"
