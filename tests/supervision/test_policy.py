"""The policy as tables: what was seen, and what is decided; and what no observation whatever may
lead to.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.supervision.policy import (
    AbandonRanks,
    Admit,
    Complete,
    Depart,
    Fail,
    Observation,
    Promote,
    Rewind,
    Rules,
    ShardObservation,
    decide,
)

WAITS, GOES_ON = Rules(30.0), Rules(30.0, min_workers=2)
ALL = frozenset({0, 1, 2})


def alive(
    number: int = 5, epoch: int = 1, reason: str = "reconfigured", **more: Any
) -> ShardObservation:
    return ShardObservation(True, epoch, reason, number, **more)


def dead(standby: int | None = None) -> ShardObservation:
    return ShardObservation(False, standby=standby)


TABLE: list[tuple[str, Observation, Rules, list[type]]] = [
    ("all is well", Observation([alive(), alive()]), WAITS, []),
    ("shards within a round", Observation([alive(5), alive(6)]), WAITS, []),
    ("a standby at the same round", Observation([dead(5), alive(5)]), WAITS, [Promote]),
    ("a standby one behind", Observation([dead(4), alive(5)]), WAITS, [Promote]),
    ("a standby one ahead", Observation([dead(6), alive(5)]), WAITS, [Promote]),
    ("a standby too far behind", Observation([dead(3), alive(5)]), WAITS, [Rewind]),
    ("a standby of an older time, far ahead", Observation([dead(9), alive(5)]), WAITS, [Rewind]),
    (
        "a standby behind one and ahead of another",
        Observation([dead(4), alive(5), alive(6)]),
        WAITS,
        [Rewind],
    ),
    ("the only shard, with a standby at round 0", Observation([dead(0)]), WAITS, [Promote]),
    ("all shards, all with standbys", Observation([dead(5), dead(6)]), WAITS, [Promote]),
    ("one of two without a standby", Observation([dead(5), dead()]), WAITS, [Rewind]),
    ("no standby", Observation([dead(), alive()]), WAITS, [Rewind]),
    (
        "no standby, nothing to go back to",
        Observation([dead(), alive()], source=False),
        WAITS,
        [Fail],
    ),
    (
        "no standby, a change that would be lost",
        Observation([dead(), alive()], changed="the state was replaced"),
        WAITS,
        [Fail],
    ),
    (
        "a standby, a change that is kept",
        Observation([dead(5), alive()], changed="the state was replaced"),
        WAITS,
        [Promote],
    ),
    ("a reign that reached one", Observation([alive(epoch=2), alive(epoch=1)]), WAITS, [Complete]),
    (
        "a write on its way",
        Observation([alive(epoch=2, reason="replaced"), alive()], held=True),
        WAITS,
        [],
    ),
    (
        "a write half done",
        Observation([alive(epoch=2, reason="replaced"), alive()], changed="the write itself"),
        WAITS,
        [Rewind],
    ),
    (
        "a write half done after one that was whole",
        Observation([alive(epoch=2, reason="replaced"), alive(changed="before")]),
        WAITS,
        [Fail],
    ),
    ("a load half done", Observation([alive(epoch=2, reason="rewound"), alive()]), WAITS, [Rewind]),
    ("stuck", Observation([alive(5), alive(6)], stuck=True), WAITS, [Rewind]),
    ("a rank dead for a moment", Observation([alive()], dead={0: 1.0}, members=ALL), GOES_ON, []),
    (
        "a rank dead for long",
        Observation([alive()], dead={0: 31.0}, members=ALL),
        GOES_ON,
        [Depart],
    ),
    (
        "too many dead for long",
        Observation([alive()], dead={0: 31.0, 1: 31.0}, members=ALL),
        GOES_ON,
        [AbandonRanks],
    ),
    (
        "dead for long, all must be there",
        Observation([alive()], dead={0: 31.0}, members=ALL),
        WAITS,
        [AbandonRanks],
    ),
    (
        "they were told",
        Observation([alive()], dead={0: 31.0}, members=ALL, given_up=frozenset({0})),
        WAITS,
        [],
    ),
    (
        "dead, but no member",
        Observation([alive()], dead={0: 31.0}, members=frozenset({1, 2})),
        GOES_ON,
        [],
    ),
    (
        "a rank comes back",
        Observation([alive()], members=frozenset({1, 2}), asking=ALL),
        GOES_ON,
        [Admit],
    ),
    (
        "a rank comes back in a replay",
        Observation([alive(5)], members=frozenset({1, 2}), asking=ALL, highest_round=6),
        GOES_ON,
        [],
    ),
    (
        "a rank comes back after it",
        Observation([alive(6)], members=frozenset({1, 2}), asking=ALL, highest_round=6),
        GOES_ON,
        [Admit],
    ),
    (
        "a shard before a rank",
        Observation([dead(), alive()], dead={0: 31.0}, members=ALL, asking=ALL),
        GOES_ON,
        [Rewind],
    ),
    (
        "nothing hides a write on its way",
        Observation(
            [alive(epoch=2, reason="replaced"), alive()], dead={0: 31.0}, held=True, members=ALL
        ),
        GOES_ON,
        [],
    ),
]


@pytest.mark.parametrize(
    ("seen", "rules", "kinds"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_what_is_seen_leads_to_what_the_table_says(
    seen: Observation, rules: Rules, kinds: list[type]
) -> None:
    assert [type(decision) for decision in decide(seen, rules)] == kinds


def test_a_failure_says_what_would_have_helped() -> None:
    (none,) = decide(Observation([dead()], source=False), WAITS)
    assert (
        isinstance(none, Fail)
        and "there is no checkpoint to go back to: save, set Options(checkpoint_dir=...)"
        in none.why
    )
    (lost,) = decide(Observation([dead()], changed="the state was replaced after round 4"), WAITS)
    assert (
        isinstance(lost, Fail)
        and (
            "the state was replaced after round 4, which going back to the last checkpoint "
            "would lose"
        )
        in lost.why
    )


RANKS = st.frozensets(st.integers(0, 3))
SHARD = st.builds(
    ShardObservation,
    alive=st.booleans(),
    epoch=st.integers(1, 3),
    reason=st.sampled_from(["", "replaced", "rewound", "reconfigured"]),
    round=st.integers(0, 4),
    standby=st.none() | st.integers(0, 4),
    changed=st.none() | st.just("changed"),
)
SEEN = st.builds(
    Observation,
    shards=st.lists(SHARD, min_size=1, max_size=4),
    dead=st.dictionaries(st.integers(0, 3), st.floats(0, 100)),
    held=st.booleans(),
    stuck=st.booleans(),
    members=RANKS,
    asking=RANKS,
    source=st.booleans(),
    changed=st.none() | st.just("changed"),
    given_up=RANKS,
    highest_round=st.integers(0, 6),
)
RULES = st.builds(
    Rules, rejoin_timeout_s=st.floats(0, 50), min_workers=st.none() | st.integers(1, 4)
)


@given(seen=SEEN, rules=RULES)
def test_whatever_is_seen_nothing_is_decided_that_loses_a_bit(
    seen: Observation, rules: Rules
) -> None:
    decisions = decide(seen, rules)
    assert decisions == decide(seen, rules), "a successor decides the same"
    gone = tuple(index for index, shard in enumerate(seen.shards) if not shard.alive)
    for decision in decisions:
        if isinstance(decision, Promote):
            assert decision.shards == gone != ()
            rounds = [shard.round if shard.alive else shard.standby for shard in seen.shards]
            assert None not in rounds and max(rounds) - min(rounds) <= 1  # type: ignore[type-var, operator]
        if isinstance(decision, Rewind):
            assert seen.source and decision.shards == gone
            assert seen.changed is None or (
                not gone and len({shard.epoch for shard in seen.shards}) > 1
            )
        if isinstance(decision, Depart):
            left = seen.members - set(decision.ranks)
            assert rules.min_workers is not None and len(left) >= rules.min_workers
            assert all(seen.dead[rank] >= rules.rejoin_timeout_s for rank in decision.ranks)
        if isinstance(decision, Admit):
            assert max(shard.round for shard in seen.shards) >= seen.highest_round
    if gone:
        assert len(decisions) == 1, "shards come first, and by themselves"
    if any(isinstance(decision, (Depart, Admit)) for decision in decisions):
        assert len({shard.epoch for shard in seen.shards}) == 1 and not seen.stuck


@given(members=st.sets(st.integers(0, 5), min_size=1), cut=st.sets(st.integers(0, 5)))
def test_two_sides_of_a_partition_never_both_go_on_where_more_than_half_must_be_there(
    members: set[int], cut: set[int]
) -> None:
    here, there = members - cut, members & cut
    rules = Rules(0.0, min_workers=len(members) // 2 + 1)
    goes_on = []
    for side, others in ((here, there), (there, here)):
        seen = Observation([alive()], dead=dict.fromkeys(others, 1.0), members=frozenset(members))
        goes_on.append(
            bool(side) and not any(isinstance(d, AbandonRanks) for d in decide(seen, rules))
        )
    assert not all(goes_on)
