"""Leases are renewed, end, are invalidated and refused; without one a shard answers nobody, and
loses nothing by that.
"""

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distnadam.backends.ray import lease
from distnadam.backends.ray.lease import Lease, LeaseManager
from distnadam.config import Options
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import Describe, Join, Push, ShardSpec
from distnadam.protocol.supervisor_messages import Load
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"w": np.ones(10, np.float32)})


class Clock:
    """Stands still until it is moved."""

    seconds = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease, "now", lambda: clock.seconds)
    return clock


class Asked:
    """A lease whose renewals are answered by the test."""

    def __init__(self, lasts_s: float) -> None:
        self.questions: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[bool | None] = queue.Queue()
        self.renewed: queue.Queue[str] = queue.Queue()
        self.lease = Lease(
            lasts_s,
            self._ask,
            lambda: self.renewed.put("renewed"),
            lambda: self.renewed.put("refused"),
        )

    def _ask(self, report: Any) -> bool | None:
        self.questions.put(report)
        return self._answers.get()

    def answer(self, answer: bool | None) -> None:
        self._answers.put(answer)


@pytest.fixture
def asked(clock: Clock) -> Iterator[Asked]:
    asked = Asked(10.0)
    yield asked
    asked.answer(False)  # ends its thread


def test_a_lease_counts_from_when_it_was_asked_for_and_ends(asked: Asked, clock: Clock) -> None:
    assert not asked.lease.valid
    asked.questions.get()
    clock.seconds += 4.0  # the answer takes its time
    asked.answer(True)
    asked.renewed.get()
    assert asked.lease.valid
    clock.seconds += 5.9
    assert asked.lease.valid
    clock.seconds += 0.2
    assert not asked.lease.valid


def test_a_lease_asked_for_before_it_was_invalidated_does_not_count(
    asked: Asked, clock: Clock
) -> None:
    assert asked.questions.get() == ()
    clock.seconds += 1.0
    asked.lease.invalidate("the standby is lost")
    asked.answer(True)
    asked.renewed.get()
    assert not asked.lease.valid
    assert asked.questions.get() == ("the standby is lost",)
    asked.answer(True)
    asked.renewed.get()
    assert asked.lease.valid
    asked.lease.invalidate("another")  # wakes it
    asked.lease.invalidate("a third")  # both are told, or neither is
    assert asked.questions.get() in (("another",), ("another", "a third"))
    asked.answer(True)
    asked.renewed.get()
    asked.questions.get()
    asked.answer(True)
    asked.renewed.get()
    assert asked.lease.valid


def test_a_shard_that_is_refused_learns_it_once(asked: Asked) -> None:
    asked.questions.get()
    asked.answer(False)
    assert asked.renewed.get() == "refused"
    assert not asked.lease.valid


def leases(clock: Clock, *, belongs: bool) -> LeaseManager:
    """A manager whose thread has looked once."""
    looked: queue.Queue[None] = queue.Queue()
    given = LeaseManager(8.0, lambda: belongs, lambda: looked.put(None))
    if belongs:
        while not given.is_leader:
            pass
    else:
        looked.get()
    return given


def test_only_known_shards_get_leases_and_a_refusal_says_how_long_the_last_is_valid(
    clock: Clock,
) -> None:
    given = leases(clock, belongs=True)
    assert given.renew("stranger") is False
    given.admit("shard")
    assert given.renew("shard") is True
    clock.seconds += 3.0
    assert given.refuse("shard") == 5.0
    assert given.renew("shard") is False
    given.admit("never asked")
    assert given.refuse("never asked") == 0.0


def test_a_successor_waits_for_leases_that_its_predecessor_may_have_given(clock: Clock) -> None:
    given = leases(clock, belongs=True)
    given.admit("shard", inherited=True)
    assert (
        given.refuse("shard") == 8.0 + 4.0
    )  # until a predecessor that was cut off had noticed that


def test_a_supervisor_that_no_longer_belongs_to_the_cluster_gives_no_lease(
    clock: Clock,
) -> None:
    given = leases(clock, belongs=False)
    given.admit("shard")
    assert not given.is_leader
    assert given.renew("shard") is None


def test_a_shard_without_a_lease_only_reports_status_and_answers_once_it_has_one() -> None:
    spec = ShardSpec(
        index=0,
        num_shards=1,
        num_workers=1,
        replicas=0,
        name=None,
        config=NadamConfig(),
        options=Options(),
        layout=LAYOUT,
        ranges=LAYOUT.cuts(1)[0],
    )
    may = [True]
    host = ShardHost(spec, can_send=lambda: may[0])
    host.send(Load(epoch=1, params={"float32": np.ones(10, np.float32)})).result(0)
    host.send(Join(rank=0)).result(0)
    may[0] = False
    gradients = {"float32": np.ones(10, np.float32)}
    decided = host.send(Push(epoch=1, rank=0, incarnation=1, round=1, gradients=gradients))
    assert host.send(Describe()).result(0).round == 0, "no round was begun"
    assert not decided.done()
    host.resume()
    assert not decided.done()
    may[0] = True
    host.resume()
    assert decided.result(0).round == 1
    host.close()
