"""Pushes on their way to a far shard: summed where the whole group is here, else sent singly."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from distnadam.errors import GroupChanged, Rewound
from distnadam.nadam.mean import Grouping, Scratch, clipped_mean
from distnadam.protocol.messages import GroupPush, Push
from distnadam.transport.push_groups import PushGroups, sum_into

SIZE = 5


class Sent:
    """What went to a shard, and the answers that came back to workers."""

    def __init__(self, num_workers: int = 4, sum_group: int = 2) -> None:
        self.messages: list[tuple[Any, Any]] = []
        self.answers: list[tuple[int, Any]] = []
        self.connected = list(range(num_workers))
        self.groups = PushGroups(
            num_workers=num_workers,
            sum_group=sum_group,
            send=lambda message, reply: self.messages.append((message, reply)),
            connected=lambda: self.connected,
            lend=lambda: {"float32": np.empty(SIZE, np.float32)},
        )

    def put(self, rank: int, **fields: Any) -> None:
        given = {"epoch": 0, "incarnation": 1, "round": 1, "gradients": gradients(rank)}
        push = Push(rank=rank, **{**given, **fields})
        self.groups.put(push, lambda answer: self.answers.append((rank, answer)))

    @property
    def kinds(self) -> list[Any]:
        """The members of each group's push and the rank of each single one, in order."""
        return [tuple(m.members) if isinstance(m, GroupPush) else m.rank for m, _ in self.messages]


def gradients(rank: int) -> dict[str, Any]:
    return {"float32": np.full(SIZE, 0.1 * (rank + 1), np.float32)}


def test_a_group_that_is_here_goes_as_one_in_rank_order_and_all_get_the_answer() -> None:
    sent = Sent()
    for rank in (3, 1, 2, 0):
        sent.put(rank)
    assert sent.kinds == [(2, 3), (0, 1)] and not sent.groups.is_waiting
    (first, reply), (second, _) = sent.messages
    expected = gradients(2)["float32"] + gradients(3)["float32"]
    assert first.gradients["float32"].tobytes() == expected.tobytes()
    assert second.gradients["float32"].dtype == np.float32
    reply("decided")
    assert sent.answers == [(2, "decided"), (3, "decided")]


def test_a_lone_rank_and_one_whose_group_is_partly_elsewhere_go_at_once() -> None:
    sent = Sent(num_workers=5)
    sent.connected.remove(1)
    for rank in (4, 0, 2, 3):
        sent.put(rank)
    assert sent.kinds == [4, 0, (2, 3)]


def test_those_who_wait_for_a_rank_that_is_gone_go_singly_and_so_does_its_next_worker() -> None:
    sent = Sent()
    sent.put(0)
    assert sent.kinds == [] and sent.groups.is_waiting
    sent.groups.gone(1)
    assert sent.kinds == [0] and not sent.groups.is_waiting
    sent.put(1, incarnation=2)
    assert sent.kinds == [0, 1], "its group's other push has gone already"
    for rank in (0, 1):
        sent.put(rank, round=2)
    assert sent.kinds == [0, 1, (0, 1)]


def test_nobody_waits_for_ever_for_one_that_stands_still() -> None:
    sent = Sent()
    sent.put(0)
    sent.put(2)
    sent.groups.release()
    assert sent.kinds == [0, 2] and not sent.groups.is_waiting


@pytest.mark.parametrize(
    "odd",
    [
        {"rank": 1, "round": 2},
        {"rank": 1, "epoch": 1},
        {"rank": 1, "gradients": None, "rejection": "NaN"},
        {"rank": 0},
        {"rank": 0, "incarnation": 2},
    ],
)
def test_pushes_that_do_not_fit_together_go_singly(odd: dict[str, Any]) -> None:
    sent = Sent()
    sent.put(0)
    sent.put(**odd)
    assert sent.kinds == [0, odd["rank"]] and not sent.groups.is_waiting


def test_a_push_for_a_round_that_has_gone_does_not_wait() -> None:
    sent = Sent()
    for rank in (0, 1, 1):
        sent.put(rank, round=2)
    assert sent.kinds == [(0, 1), 1]
    sent.put(0, round=1)
    assert sent.kinds == [(0, 1), 1, 0]
    sent.put(0, round=1, epoch=1)
    assert sent.groups.is_waiting, "all went back"


def test_a_group_that_must_be_taken_apart_goes_singly_from_the_workers_memory() -> None:
    sent = Sent()
    for rank in (0, 1):
        sent.put(rank)
    sent.messages[0][1](GroupChanged("singly"))
    assert sent.kinds == [(0, 1), 0, 1] and sent.answers == []
    singles = [message for message, _ in sent.messages[1:]]
    assert [m.gradients["float32"][0] for m in singles] == [np.float32(0.1), np.float32(0.2)]
    for _, reply in sent.messages[1:]:
        reply("decided")
    assert sent.answers == [(0, "decided"), (1, "decided")]


def test_an_error_that_befalls_a_group_is_every_members() -> None:
    sent = Sent()
    for rank in (0, 1):
        sent.put(rank)
    error = Rewound("all went back", 1, 0)
    sent.messages[0][1](error)
    assert sent.answers == [(0, error), (1, error)]


@pytest.mark.parametrize("dtypes", [("f4", "f4", "f4"), ("f2", "f4", ml_dtypes.bfloat16), ("f2",)])
def test_a_sum_has_the_bits_of_the_sum_in_the_kernels_mean(dtypes: Any) -> None:
    size = (1 << 16) + 100
    rng = np.random.default_rng(1)
    given = [rng.standard_normal(size).astype(dtype) for dtype in dtypes]
    other = rng.standard_normal(size).astype(np.float32)
    total = np.full(size, np.nan, np.float32)
    sum_into(total, given)
    count = len(given) + 1
    blocks = Scratch("float32").blocks(size)
    whole = clipped_mean([*given, other], Grouping((len(given), 1), count), None, None, blocks)
    expected = whole.tobytes()
    blocks = Scratch("float32").blocks(size)
    summed = clipped_mean([total, other], Grouping((1, 1), count), None, None, blocks)
    assert summed.tobytes() == expected


def test_a_rank_that_was_waited_for_in_vain_is_not_waited_for_again_until_it_pushes() -> None:
    sent = Sent()
    for rank in (0, 2, 3):
        sent.put(rank)
    assert sent.kinds == [(2, 3)] and sent.groups.is_waiting
    sent.groups.release()
    sent.put(0, round=2)
    assert sent.kinds == [(2, 3), 0, 0] and not sent.groups.is_waiting
    for rank in (2, 3):
        sent.put(rank, round=2)
    assert sent.kinds[-1] == (2, 3), "another group is not concerned"
    sent.put(1, round=2)
    assert sent.kinds[-1] == 1, "its group's other push has gone already"
    sent.put(1, round=3)
    assert sent.groups.is_waiting
    sent.put(0, round=3)
    assert sent.kinds[-1] == (0, 1)
