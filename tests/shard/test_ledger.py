"""The ledger against a plain set of what was counted: exact for ever, plain data and back,
small.
"""

from hypothesis import given
from hypothesis import strategies as st

from distnadam.shard.ledger import DIRECT, Ledger

JOINING, PUSHING = st.sets(st.integers(0, 3)), st.sets(st.integers(DIRECT, 3))
EVENTS = st.lists(st.tuples(JOINING, PUSHING), max_size=40)


@given(events=EVENTS)
def test_what_was_counted_is_known_and_nothing_else_is(
    events: list[tuple[set[int], set[int]]],
) -> None:
    ledger, counted = Ledger(), set()
    for decided, (joining, pushing) in enumerate(events, start=1):
        for rank in joining:
            ledger.admit(rank, None)
        for rank in pushing:
            if rank == DIRECT:  # each is an incarnation of its own
                ledger.admit(rank, None)
            ledger.count(rank, ledger.newest[rank], decided)
            counted.add((rank, ledger.newest[rank], decided))
    again = Ledger.from_dict(ledger.to_dict())
    for rank in (DIRECT, *range(4)):
        assert (
            again.newest[rank]
            == ledger.newest[rank]
            == sum(rank in joining or (rank == DIRECT in pushing) for joining, pushing in events)
        )
        for incarnation in range(ledger.newest[rank] + 2):
            for decided in range(len(events) + 2):
                expected = (rank, incarnation, decided) in counted
                assert (
                    ledger.counted(rank, incarnation, decided)
                    == again.counted(rank, incarnation, decided)
                    == expected
                )


def test_a_long_run_of_one_worker_is_one_entry() -> None:
    ledger = Ledger()
    for decided in range(1, 10_000):
        ledger.count(0, 1, decided)
    assert ledger.to_dict()["runs"] == [[0, 1, 1, 9999]]
    assert ledger.counted(0, 1, 5000)


def test_many_steps_from_outside_in_a_row_are_one_entry() -> None:
    ledger = Ledger()
    for decided in range(1, 10_000):
        ledger.count(DIRECT, ledger.admit(DIRECT, None), decided)
    assert ledger.to_dict()["runs"] == [[DIRECT, 1, 1, 9999]]
    assert ledger.counted(DIRECT, 5000, 5000)
    assert not ledger.counted(DIRECT, 5000, 5001)


def test_an_older_incarnation_does_not_become_the_newest() -> None:
    ledger = Ledger()
    assert ledger.admit(0, 3) == 3
    assert ledger.admit(0, 2) == 2
    assert ledger.newest[0] == 3
    assert ledger.admit(0, None) == 4
