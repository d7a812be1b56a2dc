"""What leaves before its push: pieces that are large enough, each element once."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.client.push_ahead import PushAhead
from distnadam.protocol.messages import PushSlice
from distnadam.tensors.layout import TensorSpec

MIB = 1 << 20


@dataclass
class Channel:
    """Remembers what is sent to shards of other hosts."""

    relayed: frozenset[int] = frozenset({1})
    sent: list[tuple[int, PushSlice]] = field(default_factory=list)

    def send_ahead(self, shard: int, part: PushSlice) -> bool:
        self.sent.append((shard, part))
        return True


class Session:
    """Of rank 3, whose shards 0 and 1 hold a MiB of float32 each, shard 1 one of float64 too."""

    def __init__(self) -> None:
        self.rank, self.epoch, self.round, self.incarnation = 3, 5, 7, 2
        self.in_sync = True
        self.ranges = [
            {"float32": (0, MIB)},
            {"float32": (MIB, 2 * MIB), "float64": (0, MIB)},
        ]
        self.channel = Channel()

    @property
    def sent(self) -> list[tuple[int, str, int, int]]:
        return [(shard, each.space, each.begin, each.end) for shard, each in self.channel.sent]


def tensor(space: str, begin: int, end: int) -> TensorSpec:
    return TensorSpec(path="w", shape=(end - begin,), dtype=space, begin=begin, end=end)


def test_only_large_pieces_leave_for_relayed_shards() -> None:
    session = Session()
    ahead = PushAhead(session)
    ahead.wrote(tensor("float32", 0, MIB))  # of a shard of this host
    assert not ahead.written
    ahead.wrote(tensor("float32", 2 * MIB - 100, 2 * MIB))
    assert ahead.written and session.sent == []
    ahead.wrote(tensor("float32", MIB - 5, MIB + 5))
    ahead.wrote(tensor("float32", 2 * MIB - MIB // 4, 2 * MIB - 100))
    assert session.sent == [(1, "float32", 2 * MIB - MIB // 4, 2 * MIB)]
    ahead.wrote(tensor("float64", 0, MIB))
    assert ahead.take_counts(is_pushed=True) == {1: 2}
    assert ahead.take_counts(is_pushed=True) == {} and not ahead.written
    (_, first), *_ = session.channel.sent
    assert (first.rank, first.epoch, first.round, first.incarnation) == (3, 5, 8, 2)


def test_what_was_sent_does_not_count_for_another_push() -> None:
    ahead = PushAhead(Session())
    ahead.wrote(tensor("float64", 0, MIB))
    assert ahead.written
    assert ahead.take_counts(is_pushed=False) == {}
    assert ahead.take_counts(is_pushed=True) == {}


@pytest.mark.parametrize("change", ["epoch", "round", "incarnation", "ranges"])
def test_what_was_written_for_another_push_or_cut_is_forgotten(change: str) -> None:
    session = Session()
    ahead = PushAhead(session)
    ahead.wrote(tensor("float64", 0, MIB // 2))
    ahead.wrote(tensor("float32", MIB, MIB + 100))
    now = getattr(session, change)
    setattr(session, change, list(now) if change == "ranges" else now + 1)
    ahead.wrote(tensor("float32", MIB + 100, MIB + 200))
    assert ahead.written == {(1, "float32"): [(MIB + 100, MIB + 200)]}
    assert ahead.take_counts(is_pushed=True) == {}


def test_nothing_leaves_before_the_worker_knows_its_round() -> None:
    session = Session()
    session.in_sync = False
    PushAhead(session).wrote(tensor("float64", 0, MIB))
    assert session.sent == []


@given(st.permutations(range(16)))
def test_no_element_is_sent_twice_and_each_piece_is_large(order: list[int]) -> None:
    session = Session()
    ahead, size = PushAhead(session), MIB // 16
    for index in order:
        ahead.wrote(tensor("float32", MIB + index * size, MIB + (index + 1) * size))
    sent = sorted((begin, end) for _, _, begin, end in session.sent)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sent))
    assert sent and all(4 * (end - begin) >= MIB for begin, end in sent)
