"""What leaves before its push: pieces that are large enough, each element once."""

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distnadam.client.push_ahead import PushAhead
from distnadam.protocol.messages import PushSlice

MIB = 1 << 20
RANGES = [{"float32": (0, MIB)}, {"float32": (MIB, 2 * MIB), "float64": (0, MIB)}]


@dataclass
class Channel:
    """Remembers what is sent to shards of other hosts."""

    relayed: frozenset[int] = frozenset({1})
    sent: list[tuple[int, str, int, int]] = field(default_factory=list)

    def send_ahead(self, shard: int, part: PushSlice) -> bool:
        self.sent.append((shard, part.space, part.begin, part.end))
        return True


def make(space: str, begin: int, end: int) -> PushSlice:
    return PushSlice(epoch=1, rank=0, incarnation=1, round=1, space=space, begin=begin, end=end)


def test_only_large_pieces_leave_for_relayed_shards() -> None:
    channel, pushing = Channel(), PushAhead(make)
    pushing.wrote(channel, RANGES, "float32", 0, MIB)  # of a shard of this host
    pushing.wrote(channel, RANGES, "float32", 2 * MIB - 100, 2 * MIB)
    assert channel.sent == []
    pushing.wrote(channel, RANGES, "float32", MIB - 5, MIB + 5)
    pushing.wrote(channel, RANGES, "float32", 2 * MIB - MIB // 4, 2 * MIB - 100)
    assert channel.sent == [(1, "float32", 2 * MIB - MIB // 4, 2 * MIB)]
    pushing.wrote(channel, RANGES, "float64", 0, MIB)
    assert pushing.take_counts(is_pushed=True) == {1: 2}
    assert pushing.take_counts(is_pushed=True) == {}


def test_what_was_sent_does_not_count_for_another_push() -> None:
    channel, pushing = Channel(), PushAhead(make)
    pushing.wrote(channel, RANGES, "float64", 0, MIB)
    assert pushing.take_counts(is_pushed=False) == {}
    assert pushing.take_counts(is_pushed=True) == {}


@given(st.permutations(range(16)))
def test_no_element_is_sent_twice_and_the_rest_is_small(order: list[int]) -> None:
    channel, pushing = Channel(), PushAhead(make)
    size = MIB // 16
    for index in order:
        pushing.wrote(channel, RANGES, "float32", MIB + index * size, MIB + (index + 1) * size)
    sent = sorted((begin, end) for _, _, begin, end in channel.sent)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sent))
    assert sent and all(4 * (end - begin) >= MIB for begin, end in sent)
