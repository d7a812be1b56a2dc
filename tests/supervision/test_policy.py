"""The policy as a table of observations and decisions, and what no observation may lead to."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam.supervision.decisions import (
    AbandonRanks,
    Admit,
    Complete,
    CompleteConfig,
    Depart,
    DropStandbys,
    DropSuccessors,
    Fail,
    Fence,
    FillStandbys,
    FinishDeadWorkers,
    HandOver,
    Promote,
    ReleaseHold,
    ReportWorkersDied,
    Rewind,
    StartStandbys,
)
from distnadam.supervision.policy import Observation, Rules, ShardObservation, decide

WAITS = Rules(rejoin_timeout_s=30.0)
GOES_ON = Rules(rejoin_timeout_s=30.0, min_workers=2)
REPLICATED = Rules(rejoin_timeout_s=30.0, replicas=1)
ALL = frozenset({0, 1, 2})


def alive(
    number: int = 5, epoch: int = 1, reason: str = "reconfigured", **more: Any
) -> ShardObservation:
    return ShardObservation(alive=True, epoch=epoch, reason=reason, round=number, **more)


def dead(standby: int | None = None, *, fenced: bool = True) -> ShardObservation:
    return ShardObservation(alive=False, fenced=fenced, standby=standby)


def followed(number: int = 5) -> ShardObservation:
    return alive(number, standby=number, has_standby=True)


HELD_BY_THE_DEAD: dict[str, Any] = {"expired_hold": "token"}
LEAVES: dict[str, Any] = {"leaves": True}
RELIEVED: dict[str, Any] = {"standby": 5, "has_standby": True, "standby_leaves": True}
TABLE: list[tuple[str, Observation, Rules, list[type]]] = [
    (
        "a host is to be left, without a standby",
        Observation(shards=[alive(**LEAVES), alive()]),
        WAITS,
        [StartStandbys],
    ),
    (
        "the standby of a shard that leaves is there, and empty",
        Observation(shards=[alive(**LEAVES, has_standby=True), alive()]),
        WAITS,
        [FillStandbys],
    ),
    (
        "the standby of a shard that leaves is being filled",
        Observation(shards=[alive(**LEAVES, has_standby=True, filling=True), alive()]),
        WAITS,
        [],
    ),
    (
        "the standby of a shard that leaves follows",
        Observation(shards=[alive(**LEAVES, standby=5, has_standby=True), alive()]),
        WAITS,
        [HandOver],
    ),
    (
        "the standby of a shard that leaves was dropped, and the shard does not know it yet",
        Observation(shards=[alive(**LEAVES, standby=5), alive()]),
        WAITS,
        [],
    ),
    (
        "it writes files",
        Observation(shards=[alive(**LEAVES, standby=5, has_standby=True, busy=True), alive()]),
        WAITS,
        [],
    ),
    (
        "somebody acts on all shards",
        Observation(shards=[alive(**LEAVES, standby=5, has_standby=True), alive()], held=True),
        WAITS,
        [],
    ),
    (
        "callers act on all shards one after the other",
        Observation(
            shards=[alive(**LEAVES, standby=5, has_standby=True), alive()],
            held=True,
            held_long=False,
        ),
        WAITS,
        [HandOver],
    ),
    (
        "a rank wants to join first",
        Observation(
            shards=[alive(**LEAVES, standby=5, has_standby=True), alive()],
            asking=frozenset({1}),
            members=frozenset({0}),
        ),
        WAITS,
        [Admit],
    ),
    (
        "the host is not to be left any more, and no standby was asked for",
        Observation(shards=[alive(standby=5, has_standby=True), alive()]),
        WAITS,
        [DropStandbys],
    ),
    (
        "a standby's host is to be left",
        Observation(shards=[alive(**RELIEVED), followed()]),
        REPLICATED,
        [StartStandbys],
    ),
    (
        "its successor is there, and empty",
        Observation(shards=[alive(**RELIEVED, has_successor=True), followed()]),
        REPLICATED,
        [FillStandbys],
    ),
    (
        "its successor is being filled",
        Observation(shards=[alive(**RELIEVED, has_successor=True, filling=True), followed()]),
        REPLICATED,
        [],
    ),
    (
        "its successor could not be filled",
        Observation(
            shards=[alive(**RELIEVED, has_successor=True, successor_unfilled=True), followed()]
        ),
        REPLICATED,
        [DropSuccessors],
    ),
    (
        "its host need not be left after all",
        Observation(shards=[alive(standby=5, has_standby=True, has_successor=True), followed()]),
        REPLICATED,
        [FillStandbys],
    ),
    (
        "a standby whose host is to be left follows no more",
        Observation(shards=[alive(has_standby=True, standby_leaves=True), followed()]),
        REPLICATED,
        [DropStandbys],
    ),
    (
        "a shard and its standby are to leave",
        Observation(shards=[alive(**LEAVES, **RELIEVED), followed()]),
        REPLICATED,
        [StartStandbys],
    ),
    ("all is well", Observation(shards=[alive(), alive()]), WAITS, []),
    ("shards within a round", Observation(shards=[alive(5), alive(6)]), WAITS, []),
    ("a standby at the same round", Observation(shards=[dead(5), alive(5)]), WAITS, [Promote]),
    ("a standby one behind", Observation(shards=[dead(4), alive(5)]), WAITS, [Promote]),
    ("a standby one ahead", Observation(shards=[dead(6), alive(5)]), WAITS, [Promote]),
    ("a standby too far behind", Observation(shards=[dead(3), alive(5)]), WAITS, [Rewind]),
    (
        "a standby of an older time, far ahead",
        Observation(shards=[dead(9), alive(5)]),
        WAITS,
        [Rewind],
    ),
    (
        "a standby behind one and ahead of another",
        Observation(shards=[dead(4), alive(5), alive(6)]),
        WAITS,
        [Rewind],
    ),
    ("the only shard, with a standby at round 0", Observation(shards=[dead(0)]), WAITS, [Promote]),
    ("all shards, all with standbys", Observation(shards=[dead(5), dead(6)]), WAITS, [Promote]),
    ("one of two without a standby", Observation(shards=[dead(5), dead()]), WAITS, [Rewind]),
    ("no standby", Observation(shards=[dead(), alive()]), WAITS, [Rewind]),
    (
        "no standby, nothing to go back to",
        Observation(shards=[dead(), alive()], has_restore_point=False),
        WAITS,
        [Fail],
    ),
    (
        "no standby, a change that would be lost",
        Observation(shards=[dead(), alive()], would_lose="the state was replaced"),
        WAITS,
        [Fail],
    ),
    (
        "a standby, a change that is kept",
        Observation(shards=[dead(5), alive()], would_lose="the state was replaced"),
        WAITS,
        [Promote],
    ),
    (
        "a Reconfigure that reached one",
        Observation(shards=[alive(epoch=2), alive(epoch=1)]),
        WAITS,
        [Complete],
    ),
    (
        "a write on its way",
        Observation(shards=[alive(epoch=2, reason="replaced"), alive()], held=True),
        WAITS,
        [],
    ),
    (
        "a write half done",
        Observation(
            shards=[alive(epoch=2, reason="replaced"), alive()], would_lose="the write itself"
        ),
        WAITS,
        [Rewind],
    ),
    (
        "a write half done after one that was whole",
        Observation(
            shards=[alive(epoch=2, reason="replaced"), alive()],
            would_lose="the write itself",
            undoing_would_lose="before",
        ),
        WAITS,
        [Fail],
    ),
    (
        "a change of the configuration on its way",
        Observation(shards=[alive(revision=2), alive(revision=1)], held=True),
        WAITS,
        [],
    ),
    (
        "a change of the configuration half done, by which no shard has stepped",
        Observation(shards=[alive(revision=1), alive(revision=0)], would_lose="this"),
        WAITS,
        [CompleteConfig],
    ),
    (
        "a change of the configuration that some shards have stepped by",
        Observation(
            shards=[alive(revision=1, applied_revision=1), alive(revision=0)],
            would_lose="this",
        ),
        WAITS,
        [Rewind],
    ),
    (
        "a change of the configuration amid a round that some shards have stepped",
        Observation(shards=[alive(6, revision=1), alive(5, revision=0)]),
        WAITS,
        [Rewind],
    ),
    (
        "a change of the configuration that was stepped by, after one that was whole",
        Observation(
            shards=[alive(revision=2, applied_revision=2), alive(revision=1)],
            would_lose="this",
            undoing_would_lose="before",
        ),
        WAITS,
        [Fail],
    ),
    (
        "a load half done, by which a replacement was undone",
        Observation(
            shards=[alive(epoch=2, reason="rewound"), alive()], would_lose="the half of it"
        ),
        WAITS,
        [Rewind],
    ),
    (
        "a load half done, and a replacement completed before",
        Observation(
            shards=[alive(epoch=2, reason="rewound"), alive()],
            would_lose="it",
            undoing_would_lose="it",
        ),
        WAITS,
        [Fail],
    ),
    (
        "a load half done",
        Observation(shards=[alive(epoch=2, reason="rewound"), alive()]),
        WAITS,
        [Rewind],
    ),
    (
        "shards that cannot complete a round",
        Observation(shards=[alive(5), alive(6)], cannot_complete=True),
        WAITS,
        [Rewind],
    ),
    (
        "a rank dead for a moment",
        Observation(shards=[alive()], dead={0: 1.0}, members=ALL),
        GOES_ON,
        [],
    ),
    (
        "a rank dead for long",
        Observation(shards=[alive()], dead={0: 31.0}, members=ALL),
        GOES_ON,
        [Depart],
    ),
    (
        "too many dead for long",
        Observation(shards=[alive()], dead={0: 31.0, 1: 31.0}, members=ALL),
        GOES_ON,
        [AbandonRanks],
    ),
    (
        "dead for long, all must be there",
        Observation(shards=[alive()], dead={0: 31.0}, members=ALL),
        WAITS,
        [AbandonRanks],
    ),
    (
        "their waiters know",
        Observation(shards=[alive()], dead={0: 31.0}, members=ALL, given_up=frozenset({0})),
        WAITS,
        [],
    ),
    (
        "dead, but no member",
        Observation(shards=[alive()], dead={0: 31.0}, members=frozenset({1, 2})),
        GOES_ON,
        [],
    ),
    (
        "a rank comes back",
        Observation(shards=[alive()], members=frozenset({1, 2}), asking=ALL),
        GOES_ON,
        [Admit],
    ),
    (
        "a rank comes back in a replay",
        Observation(shards=[alive(5)], members=frozenset({1, 2}), asking=ALL, highest_round=6),
        GOES_ON,
        [],
    ),
    (
        "a rank comes back after it",
        Observation(shards=[alive(6)], members=frozenset({1, 2}), asking=ALL, highest_round=6),
        GOES_ON,
        [Admit],
    ),
    (
        "a shard before a rank",
        Observation(shards=[dead(), alive()], dead={0: 31.0}, members=ALL, asking=ALL),
        GOES_ON,
        [Rewind],
    ),
    (
        "nothing hides a write on its way",
        Observation(
            shards=[alive(epoch=2, reason="replaced"), alive()],
            dead={0: 31.0},
            held=True,
            members=ALL,
        ),
        GOES_ON,
        [],
    ),
    (
        "a shard died just now, its standby is yet to be asked",
        Observation(shards=[dead(fenced=False), alive()]),
        WAITS,
        [Fence],
    ),
    (
        "a second shard died before the first was replaced",
        Observation(shards=[dead(5), dead(fenced=False)]),
        WAITS,
        [Fence],
    ),
    (
        "a shard died just now, with nothing to go back to",
        Observation(shards=[dead(fenced=False)], has_restore_point=False),
        WAITS,
        [Fence],
    ),
    (
        "a dead shard before a hold that expired",
        Observation(shards=[dead(5), alive()], **HELD_BY_THE_DEAD),
        WAITS,
        [Promote],
    ),
    ("a hold expired", Observation(shards=[alive()], **HELD_BY_THE_DEAD), WAITS, [ReleaseHold]),
    (
        "a hold expired in the middle of a write",
        Observation(shards=[alive(epoch=2, reason="replaced"), alive()], **HELD_BY_THE_DEAD),
        WAITS,
        [ReleaseHold, Rewind],
    ),
    (
        "a worker died and no shard knows it",
        Observation(shards=[alive()], unreported={1: 4}, members=ALL),
        WAITS,
        [ReportWorkersDied],
    ),
    (
        "a worker died a moment ago",
        Observation(shards=[alive()], dead={1: 0.0}, unfinished=frozenset({1}), members=ALL),
        WAITS,
        [FinishDeadWorkers],
    ),
    (
        "a worker died a moment ago, and shards cannot complete a round",
        Observation(
            shards=[alive(5), alive(6)],
            dead={1: 0.0},
            unfinished=frozenset({1}),
            cannot_complete=True,
        ),
        WAITS,
        [FinishDeadWorkers, Rewind],
    ),
    (
        "a dead shard before a dead worker",
        Observation(
            shards=[dead(5), alive()], dead={1: 0.0}, unfinished=frozenset({1}), members=ALL
        ),
        WAITS,
        [Promote],
    ),
    (
        "a worker that is gone for long and was not seen to",
        Observation(shards=[alive()], dead={0: 31.0}, unfinished=frozenset({0}), members=ALL),
        GOES_ON,
        [FinishDeadWorkers, Depart],
    ),
    ("every shard is followed", Observation(shards=[followed(), followed()]), REPLICATED, []),
    (
        "one shard has no standby",
        Observation(shards=[followed(), alive()]),
        REPLICATED,
        [StartStandbys],
    ),
    ("nobody wants standbys", Observation(shards=[alive(), alive()]), WAITS, []),
    (
        "a standby was started and is empty",
        Observation(shards=[alive(has_standby=True)]),
        REPLICATED,
        [FillStandbys],
    ),
    (
        "one standby is missing, one empty",
        Observation(shards=[alive(), alive(has_standby=True)]),
        REPLICATED,
        [StartStandbys, FillStandbys],
    ),
    (
        "a standby is on its way",
        Observation(shards=[alive(filling=True), followed()]),
        REPLICATED,
        [],
    ),
    (
        "a stale standby",
        Observation(shards=[alive(has_standby=True, stale=True)]),
        REPLICATED,
        [DropStandbys],
    ),
    (
        "a rank comes back and a standby is started beside",
        Observation(shards=[alive()], members=frozenset({1, 2}), asking=ALL),
        Rules(rejoin_timeout_s=30.0, min_workers=2, replicas=1),
        [Admit, StartStandbys],
    ),
    (
        "a stale standby of one shard, none of another",
        Observation(shards=[alive(has_standby=True, stale=True), alive()]),
        REPLICATED,
        [DropStandbys, StartStandbys],
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
    (none,) = decide(Observation(shards=[dead()], has_restore_point=False), WAITS)
    assert (
        isinstance(none, Fail)
        and "there is no checkpoint to go back to: save, set Options(checkpoint_dir=...)"
        in none.why
    )
    (lost,) = decide(
        Observation(shards=[dead()], would_lose="the state was replaced after round 4"), WAITS
    )
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
    fenced=st.booleans(),
    has_standby=st.booleans(),
    has_successor=st.booleans(),
    successor_unfilled=st.booleans(),
    standby_leaves=st.booleans(),
    filling=st.booleans(),
    stale=st.booleans(),
    epoch=st.integers(1, 3),
    reason=st.sampled_from(["", "replaced", "rewound", "reconfigured"]),
    round=st.integers(0, 4),
    standby=st.none() | st.integers(0, 4),
    revision=st.integers(0, 2),
    applied_revision=st.integers(0, 2),
)
SEEN = st.builds(
    Observation,
    shards=st.lists(SHARD, min_size=1, max_size=4),
    dead=st.dictionaries(st.integers(0, 3), st.floats(0, 100)),
    unfinished=RANKS,
    unreported=st.dictionaries(st.integers(0, 3), st.integers(1, 3)),
    held=st.booleans(),
    expired_hold=st.none() | st.just("token"),
    cannot_complete=st.booleans(),
    members=RANKS,
    asking=RANKS,
    has_restore_point=st.booleans(),
    would_lose=st.none() | st.just("changed"),
    undoing_would_lose=st.none() | st.just("before"),
    given_up=RANKS,
    highest_round=st.integers(0, 6),
)
RULES = st.builds(
    Rules,
    rejoin_timeout_s=st.floats(0, 50),
    min_workers=st.none() | st.integers(1, 4),
    replicas=st.integers(0, 1),
)


@given(seen=SEEN, rules=RULES)
def test_whatever_is_seen_nothing_is_decided_that_loses_a_bit(
    seen: Observation, rules: Rules
) -> None:
    decisions = decide(seen, rules)
    assert decisions == decide(seen, rules), "a successor decides the same"
    gone = tuple(index for index, shard in enumerate(seen.shards) if not shard.alive)
    fenced = all(seen.shards[index].fenced for index in gone)
    for decision in decisions:
        if isinstance(decision, Promote):
            assert decision.shards == gone != () and fenced
            rounds = [shard.round if shard.alive else shard.standby for shard in seen.shards]
            assert None not in rounds and max(rounds) - min(rounds) <= 1  # type: ignore[type-var, operator]
        if isinstance(decision, Rewind):
            assert seen.has_restore_point and decision.shards == gone and fenced
            assert (seen.undoing_would_lose if decision.undoing else seen.would_lose) is None
            assert not decision.undoing or (
                not gone and len({(shard.epoch, shard.revision) for shard in seen.shards}) > 1
            )
        if isinstance(decision, CompleteConfig):
            latest = max(shard.revision for shard in seen.shards)
            assert not gone and not seen.held
            assert len({(shard.epoch, shard.round) for shard in seen.shards}) == 1
            assert all(shard.applied_revision != latest for shard in seen.shards)
        if isinstance(decision, Depart):
            left = seen.members - set(decision.ranks)
            assert rules.min_workers is not None and len(left) >= rules.min_workers
            assert all(seen.dead[rank] >= rules.rejoin_timeout_s for rank in decision.ranks)
        if isinstance(decision, Admit):
            assert max(shard.round for shard in seen.shards) >= seen.highest_round
    if gone:
        assert len(decisions) == 1, "shards come first, and by themselves"
        assert isinstance(decisions[0], Fence) == (not fenced), "nothing else before that"
    if any(isinstance(decision, (StartStandbys, FillStandbys)) for decision in decisions):
        assert rules.replicas and not gone and len({shard.epoch for shard in seen.shards}) == 1
    if any(isinstance(decision, (Depart, Admit)) for decision in decisions):
        assert len({shard.epoch for shard in seen.shards}) == 1 and not seen.cannot_complete


@given(seen=SEEN, rules=RULES)
def test_no_standby_is_filled_that_is_dropped(seen: Observation, rules: Rules) -> None:
    decisions = decide(seen, rules)
    filled = {i for each in decisions if isinstance(each, FillStandbys) for i in each.shards}
    dropped = {i for each in decisions if isinstance(each, DropStandbys) for i in each.shards}
    assert not filled & dropped


@given(seen=SEEN, rules=RULES)
def test_no_standby_that_follows_is_dropped_before_another_does(
    seen: Observation, rules: Rules
) -> None:
    dropped = {i for d in decide(seen, rules) if isinstance(d, DropStandbys) for i in d.shards}
    follow = {i for i, each in enumerate(seen.shards) if each.standby is not None}
    stale = {i for i, each in enumerate(seen.shards) if each.stale}
    assert not rules.replicas or not (dropped & follow) - stale


@given(members=st.sets(st.integers(0, 5), min_size=1), cut=st.sets(st.integers(0, 5)))
def test_two_sides_of_a_partition_never_both_go_on_where_more_than_half_must_be_there(
    members: set[int], cut: set[int]
) -> None:
    here, there = members - cut, members & cut
    rules = Rules(rejoin_timeout_s=0.0, min_workers=len(members) // 2 + 1)
    goes_on = []
    for side, others in ((here, there), (there, here)):
        seen = Observation(
            shards=[alive()], dead=dict.fromkeys(others, 1.0), members=frozenset(members)
        )
        goes_on.append(
            bool(side) and not any(isinstance(d, AbandonRanks) for d in decide(seen, rules))
        )
    assert not all(goes_on)
