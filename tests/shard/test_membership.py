"""Who holds each rank, which ranks a round needs, and whose push may count."""

from typing import Any

import pytest

import distnadam.protocol.messages as msg
from distnadam.errors import (
    LatePush,
    LifecycleError,
    Reconfigured,
    RoundMismatch,
    SupersededWorker,
    WorkerLost,
)
from distnadam.shard.epochs import Epochs
from distnadam.shard.membership import Membership


def members_of_three() -> Membership:
    """Ranks 0 and 1 joined, each in a process of its own; rank 2 has not."""
    members = Membership(0, 3)
    for rank in (0, 1):
        assert members.join(msg.Join(rank=rank, process=f"process {rank}")) == 1
    return members


def push(**fields: Any) -> msg.Push:
    known: dict[str, Any] = {"epoch": 0, "rank": 0, "incarnation": 1, "round": 5, "gradients": None}
    return msg.Push(**known | fields)


def test_the_schedule_says_which_ranks_a_round_needs() -> None:
    members = members_of_three()
    members.schedule = ((1, (0, 1, 2)), (4, (0, 2)), (9, (2,)))
    needed = [members.needed(number) for number in (1, 3, 4, 8, 9, 100)]
    assert needed == [(0, 1, 2), (0, 1, 2), (0, 2), (0, 2), (2,), (2,)]


def test_a_rank_goes_to_the_newest_worker_and_an_older_one_is_refused() -> None:
    members = members_of_three()
    assert members.join(msg.Join(rank=0, process="another")) == 2
    with pytest.raises(SupersededWorker, match="rank 0 was taken over by worker 2; worker 1 must"):
        members.join(msg.Join(rank=0, incarnation=1, process="process 0"))
    assert members.taken_over(0, 1) and not members.taken_over(0, 2)


def test_a_number_given_to_two_processes_is_refused_to_the_second() -> None:
    members = members_of_three()
    assert members.join(msg.Join(rank=0, incarnation=1, process="process 0")) == 1
    with pytest.raises(SupersededWorker, match="the number 1"):
        members.join(msg.Join(rank=0, incarnation=1, process="another"))


def test_a_reserved_rank_has_no_owner_until_a_worker_joins() -> None:
    members = members_of_three()
    assert members.join(msg.Join(rank=0, reserve=True)) == 2
    assert members.live_owners == {1: (1, "process 1")}
    assert not members.taken_over(0, 1)
    assert members.join(msg.Join(rank=0, incarnation=2, process="next")) == 2
    assert members.live_owners[0] == (2, "next")


@pytest.mark.parametrize("how", ["left", "dead"])
def test_a_worker_that_left_or_died_owns_no_rank_until_one_joins(how: str) -> None:
    members = members_of_three()
    if how == "left":
        members.leave(0, 1)
    else:
        assert members.lose(0, 1)
    assert 0 not in members.live_owners
    members.join(msg.Join(rank=0, process="next"))
    assert members.live_owners[0] == (2, "next") and not members.left | members.dead


def test_only_the_newest_worker_leaves_or_dies_and_one_that_left_does_not_die() -> None:
    members = members_of_three()
    members.join(msg.Join(rank=0, process="next"))
    members.leave(0, 1)
    assert not members.lose(0, 1) and not members.left | members.dead
    members.leave(0, 2)
    assert not members.lose(0, 2) and members.dead == set()


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"rank": 3}, LifecycleError, r"rank must be in \[0, 3\), got 3"),
        ({"epoch": 7}, Exception, "message of epoch 7, expected 0"),
        ({"incarnation": 2}, SupersededWorker, "worker 2 must stop"),
        ({"round": 4}, LatePush, "push for round 4, which is over and did not count it"),
        ({"round": 6}, RoundMismatch, "expected a push for round 5, got one for round 6"),
        ({"rank": 1}, Reconfigured, "rank 1: is no member of round 5"),
    ],
)
def test_a_push_that_may_not_count_is_refused_by_name(
    fields: dict[str, int], error: type[Exception], text: str
) -> None:
    members = members_of_three()
    members.schedule = ((1, (0, 2)),)
    members.check_current(push(), Epochs(), 4)
    with pytest.raises(error, match=text):
        members.check_current(push(**fields), Epochs(), 4)


def test_a_push_is_counted_once_its_round_is_decided_by_that_worker() -> None:
    members = members_of_three()
    members.ledger.count(0, 1, 5)
    assert members.already_counted(0, push(), 5)
    assert not members.already_counted(0, push(), 4), "the round went back"
    assert not members.already_counted(0, push(incarnation=2), 5)


def test_a_rank_given_up_loses_only_rounds_that_need_its_push() -> None:
    members = members_of_three()
    assert members.abandoned(5, set()) is None
    members.given_up.add(1)
    lost = members.abandoned(5, {0})
    assert isinstance(lost, WorkerLost) and "worker 1 died before it pushed for round 5" in str(
        lost
    )
    assert members.abandoned(5, {0, 1}) is None
    members.schedule = ((1, (0, 2)),)
    assert members.abandoned(5, {0}) is None


def test_a_restored_record_forgets_no_newer_worker_and_no_owner_here() -> None:
    members = members_of_three()
    members.join(msg.Join(rank=0, process="newer"))
    record = Membership(0, 3)
    record.ledger.admit_all({0: 1, 2: 4})
    record.ledger.count(0, 1, 1)
    members.restore(record.ledger.to_dict(), ((1, (0,)),), {0: (1, "old"), 2: (4, "third")})
    assert members.ledger.newest_of_all() == {0: 2, 1: 1, 2: 4}
    assert members.ledger.counted(0, 1, 1)
    assert members.schedule == ((1, (0,)),)
    assert members.live_owners == {0: (2, "newer"), 1: (1, "process 1"), 2: (4, "third")}
