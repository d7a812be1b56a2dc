"""A group's push in a round: it counts whole or not at all, and its ranks' own beside it never."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.config import Options
from distnadam.errors import (
    DistNadamError,
    GroupChanged,
    IllegalMessage,
    NonFiniteGradient,
    Reconfigured,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import (
    CompletePush,
    GroupPush,
    Join,
    PartialNorms,
    Push,
    PushNote,
    RoundResult,
    ShardSpec,
    TotalNorms,
)
from distnadam.protocol.supervisor_messages import Reconfigure
from distnadam.runtime.shard_host import ShardHost
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"w": np.ones(4, np.float32)})
VALUES = [np.float32(1e8), np.float32(3.0), np.float32(-1e8), np.float32(1.0)]
"""By rank; their sum depends on the order."""


def shard(num_workers: int = 4, sum_group: int = 2, **config: Any) -> ShardHost:
    host = ShardHost(
        ShardSpec(
            index=0,
            num_shards=1,
            num_workers=num_workers,
            replicas=0,
            name=None,
            config=NadamConfig(sum_group=sum_group, **config),
            options=Options(on_nonfinite="skip"),
            layout=LAYOUT,
            ranges=LAYOUT.cuts(1)[0],
        )
    )
    for rank in range(num_workers):
        host.send(Join(rank=rank)).result(0)
    return host


def note(incarnation: int = 1, number: int = 1, rejection: str | None = None) -> PushNote:
    dtypes = None if rejection else {"float32": "float32"}
    return PushNote(incarnation=incarnation, round=number, dtypes=dtypes, rejection=rejection)


def gradients(value: Any) -> dict[str, Any]:
    return {"float32": np.full(4, value, np.float32)}


def push(rank: int, incarnation: int = 1, epoch: int = 0, number: int = 1) -> Push:
    return Push(
        epoch=epoch,
        rank=rank,
        incarnation=incarnation,
        round=number,
        gradients=gradients(VALUES[rank]),
    )


def group(*ranks: int, epoch: int = 0, number: int = 1, **notes: PushNote) -> GroupPush:
    members = {rank: notes.get(f"of_{rank}", note(number=number)) for rank in ranks}
    total = gradients(sum((VALUES[rank] for rank in ranks[1:]), VALUES[ranks[0]]))
    return GroupPush(epoch=epoch, round=number, members=members, gradients=total)


def moment(host: ShardHost) -> bytes:
    found: bytes = host.shard.state.m["float32"].tobytes()
    return found


def stepped_singly(**config: Any) -> bytes:
    host = shard(**config)
    for rank in range(4):
        answer = host.send(push(rank))
    assert answer.result(0).outcome == "applied"
    return moment(host)


def test_every_mix_of_groups_and_single_pushes_in_any_order_has_the_same_bits() -> None:
    parts = [
        [group(0, 1), group(2, 3)],
        [group(0, 1), push(2), push(3)],
        [push(0), push(1), group(2, 3)],
    ]
    for chosen in parts:
        for order in itertools.permutations(chosen):
            host = shard()
            answers = [host.send(message) for message in order]
            assert {answer.result(0).round for answer in answers} == {1}
            assert moment(host) == stepped_singly()
            ledger = host.shard.members.ledger
            assert all(ledger.counted(rank, 1, 1) for rank in range(4))
    assert stepped_singly() != stepped_singly(sum_group=1), "the values' order matters"


def test_a_group_and_its_ranks_own_pushes_never_both_count() -> None:
    messages = [group(0, 1), push(0), push(1), group(0, 1), group(2, 3)]
    for order in itertools.permutations(messages):
        host = shard()
        answers = [host.send(message) for message in order]
        assert {answer.result(0).round for answer in answers} == {1}
        assert moment(host) == stepped_singly()


@pytest.mark.parametrize(
    "message",
    [
        group(0),
        group(1, 2),
        group(0, 1, 2),
        group(0, 1, of_1=note(2)),
        group(0, 1, of_0=note(0)),
        group(0, 1, number=2),
        group(0, 1, of_1=note(number=2)),
        GroupPush(epoch=0, round=1, members={}, gradients=gradients(0)),
    ],
)
def test_what_is_not_the_whole_group_as_it_is_now_must_come_singly(message: GroupPush) -> None:
    host = shard()
    with pytest.raises(GroupChanged, match="push singly"):
        host.send(message).result(0)
    assert not host.shard.rounds.current.pushes


def test_a_groups_push_of_another_epoch_is_refused_as_a_single_one() -> None:
    host = shard()
    host.send(Reconfigure(epoch=3, schedule=((1, (0, 1, 2, 3)),))).result(0)
    with pytest.raises(Reconfigured, match="message of epoch 0, expected 3"):
        host.send(group(0, 1)).result(0)
    host.send(group(0, 1, epoch=3))
    assert host.shard.rounds.current.pushes.keys() == {0, 1}


def test_a_member_that_is_replaced_takes_its_group_back_and_the_others_push_again() -> None:
    host = shard()
    first, again, single = (host.send(m) for m in (group(0, 1), group(0, 1), push(0)))
    assert not first.done()
    host.send(Join(rank=1)).result(0)
    for answer in (first, again, single):
        with pytest.raises(GroupChanged):
            answer.result(0)
    assert not host.shard.rounds.current.pushes
    with pytest.raises(GroupChanged):
        host.send(group(0, 1)).result(0)
    answers = [host.send(m) for m in (push(0), push(1, 2), group(2, 3))]
    assert {answer.result(0).round for answer in answers} == {1}
    assert moment(host) == stepped_singly()
    ledger = host.shard.members.ledger
    assert ledger.counted(1, 2, 1) and not ledger.counted(1, 1, 1)


def test_a_group_formed_anew_with_the_new_worker_counts() -> None:
    host = shard()
    host.send(group(0, 1))
    host.send(Join(rank=0)).result(0)
    formed = host.send(group(0, 1, of_0=note(2)))
    assert host.send(group(2, 3)).result(0).round == formed.result(0).round == 1
    assert moment(host) == stepped_singly()


@pytest.mark.parametrize("resent", [(), (0,)])
def test_a_push_that_is_completed_brings_back_its_whole_group(resent: tuple[int, ...]) -> None:
    host = shard()
    host.send(group(0, 1))
    host.send(Join(rank=1)).result(0)
    for rank in resent:
        host.send(push(rank))
    host.send(CompletePush(1, note())).result(0)
    assert host.send(group(2, 3)).result(0).round == 1
    assert moment(host) == stepped_singly()
    ledger = host.shard.members.ledger
    assert ledger.counted(0, 1, 1) and ledger.counted(1, 1, 1)


def test_the_whole_group_of_a_completed_push_counts_whoever_joins() -> None:
    host = shard()
    host.send(group(0, 1))
    host.send(CompletePush(1, note())).result(0)
    for rank in (0, 1):
        assert host.send(Join(rank=rank)).result(0).committed == note()
    assert host.send(group(2, 3)).result(0).round == 1
    assert host.shard.members.ledger.counted(0, 1, 1)


def test_a_group_with_a_push_that_counts_already_for_certain_must_come_singly() -> None:
    """Else that push would be taken back with the group."""
    host = shard()
    host.send(CompletePush(0, note(), gradients(VALUES[0]))).result(0)
    with pytest.raises(GroupChanged):
        host.send(group(0, 1)).result(0)
    assert host.shard.rounds.current.pushes.keys() == {0}


def test_a_group_of_a_worker_that_came_after_the_round_had_all_pushes_changes_nothing() -> None:
    host = shard(clipnorm=1.0)
    for rank in range(4):
        host.send(push(rank))
    host.send(Join(rank=1)).result(0)
    with pytest.raises(GroupChanged):
        host.send(group(0, 1, of_1=note(2))).result(0)
    assert host.shard.rounds.current.pushes[1].incarnation == 1


def test_a_group_of_two_replaced_workers_is_not_brought_back_for_one_of_them() -> None:
    """The other's place may be taken by its new worker's push."""
    host = shard()
    host.send(group(0, 1))
    for rank in (0, 1):
        host.send(Join(rank=rank)).result(0)
    with pytest.raises(IllegalMessage, match="the gradients of worker 1 for round 1 are not"):
        host.send(CompletePush(1, note())).result(0)
    assert not host.shard.rounds.current.pushes
    host.send(CompletePush(0, note(), gradients(VALUES[0]))).result(0)
    host.send(CompletePush(1, note())).result(0)
    assert host.send(group(2, 3)).result(0).round == 1
    assert moment(host) == stepped_singly()


@pytest.mark.parametrize(
    ("before", "after"), [((0, 1, 2, 3), (0, 2, 3)), ((0, 2, 3), (0, 1, 2, 3))]
)
def test_a_changed_membership_takes_the_groups_apart_that_it_touches(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    host = shard()
    host.send(Reconfigure(epoch=1, schedule=((1, before),))).result(0)
    touched = host.send(group(*(rank for rank in before if rank < 2), epoch=1))
    host.send(Reconfigure(epoch=2, schedule=((1, after),))).result(0)
    with pytest.raises(GroupChanged):
        touched.result(0)
    kept = host.send(group(2, 3, epoch=2))
    host.send(Reconfigure(epoch=3, schedule=((1, after),))).result(0)
    assert not kept.done()
    for rank in after:
        if rank < 2:
            answer = host.send(push(rank, epoch=3))
    assert answer.result(0).round == kept.result(0).round == 1
    assert host.shard.members.ledger.counted(1, 1, 1) == (1 in after)


def test_a_group_with_a_member_that_rejects_ends_the_round_without_a_step() -> None:
    host = shard()
    rejecting = GroupPush(
        epoch=0, round=1, members={0: note(), 1: note(rejection="NaN in 'w'")}, gradients=None
    )
    answers = [host.send(m) for m in (rejecting, group(2, 3))]
    assert {answer.result(0).outcome for answer in answers} == {"skipped"}
    assert "NaN in 'w'" in answers[0].result(0).rejection
    assert not issubclass(GroupChanged, NonFiniteGradient)


def test_norms_are_of_the_same_mean_and_answered_to_a_group_once() -> None:
    ends = []
    for messages in ([push(rank) for rank in range(4)], [group(0, 1), group(2, 3)]):
        host = shard(clipnorm=1.0)
        measured = [host.send(message) for message in messages]
        norms = {answer.result(0).sums[0][1].tobytes() for answer in measured}
        assert all(isinstance(answer.result(0), PartialNorms) for answer in measured)
        host.send(
            TotalNorms(epoch=0, rank=3, incarnation=1, round=1, square_sums=np.array([4.0]))
        ).result(0)
        ends.append((norms, moment(host)))
    assert ends[0] == ends[1]


MOVES = st.sampled_from(
    ["push 0", "push 1", "push 2", "push 3", "group 0", "group 2", "join 0", "join 1", "join 3"]
)


@given(moves=st.lists(MOVES, max_size=14))
def test_whatever_comes_in_whatever_order_each_rank_counts_once_in_a_round(
    moves: list[str],
) -> None:
    """Each worker sends again what it is told to, and the round ends with the plain bits."""
    host = shard()
    newest = dict.fromkeys(range(4), 1)

    def send(message: Push | GroupPush) -> None:
        def answered(done: Any) -> None:
            error = done.exception()
            if error is None:
                assert isinstance(done.result(), RoundResult)
            elif isinstance(error, GroupChanged):
                ranks = message.members if isinstance(message, GroupPush) else [message.rank]
                again.extend(rank for rank in ranks)
            else:
                assert isinstance(error, DistNadamError)

        host.send(message).add_done_callback(answered)

    again: list[int] = []
    for move in [*moves, *(f"push {rank}" for rank in range(4))]:
        what, rank = move.split()[0], int(move.split()[1])
        if host.shard.progress.round:
            break
        if what == "join":
            newest[rank] = host.send(Join(rank=rank)).result(0).incarnation
        elif what == "push":
            send(push(rank, newest[rank]))
        else:
            notes = {f"of_{other}": note(newest[other]) for other in (rank, rank + 1)}
            send(group(rank, rank + 1, **notes))
        while again and not host.shard.progress.round:
            other = again.pop()
            send(push(other, newest[other]))
    assert host.shard.progress.round == 1
    assert moment(host) == stepped_singly()
    assert all(host.shard.members.ledger.counted(rank, newest[rank], 1) for rank in range(4))
