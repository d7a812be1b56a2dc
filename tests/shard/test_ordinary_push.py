"""The short way of an ordinary push changes a shard as its machine does, and asks for the same."""

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders
from distnadam.config import Options
from distnadam.errors import DistNadamError
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.shard.effects import Compute, Work
from distnadam.shard.machine import Shard
from distnadam.shard.ordinary import close, count_ahead, may_go_ahead
from distnadam.shard.ordinary_push import enter_push
from distnadam.shard.phases import Phase
from distnadam.shard.state import ShardState
from distnadam.tensors.layout import Layout

RANKS = 3
LAYOUT = Layout.of({"w": np.ones(3, np.float32)})
GRADIENTS = {"float32": np.ones(3, np.float32)}
Deliver = Callable[[Shard, Any, Any], Any]


RATES = [packed_overrides(0.1, betas, None) for betas in ((0.5, 0.75), (0.5, 0.75), (0.75, 0.5))]
RATED: list[dict[str, Any]] = [
    *({"settings": RoundSettings(overrides=rates)} for rates in RATES),
    {"settings": RoundSettings(overrides=RATES[0]), "rejection": "NaN"},
    {"settings": RoundSettings(overrides=RATES[0], absent=frozenset({0}))},
]


def new_shard(**config: Any) -> Shard:
    ranges = LAYOUT.cuts(1)[0]
    spec = msg.ShardSpec(
        index=0,
        num_shards=1,
        num_workers=RANKS,
        replicas=0,
        name=None,
        config=NadamConfig(**config),
        options=Options(),
        layout=LAYOUT,
        ranges=ranges,
    )
    shard = Shard(spec, ShardState.empty(ranges))
    for rank in range(RANKS):
        shard.receive(msg.Join(rank=rank), "join")
    return shard


def push(shard: Shard, rank: int, **changes: Any) -> msg.Push:
    """The push of a rank's newest worker for the coming round."""
    return dataclasses.replace(
        msg.Push(
            epoch=shard.epochs.now,
            rank=rank,
            incarnation=shard.members.ledger.newest[rank],
            round=shard.progress.round + 1,
            gradients=GRADIENTS,
        ),
        **changes,
    )


def content(value: Any) -> bytes:
    """The bytes of what something holds, whichever of its parts are one object, and whatever of a
    configuration was asked for.
    """
    written = io.BytesIO()
    pickler: Any = pickle.Pickler(written)
    pickler.fast = True
    pickler.dispatch_table = {NadamConfig: lambda config: (NadamConfig, (repr(config),))}
    pickler.dump(value)
    return written.getvalue()


def held_by(shard: Shard) -> bytes:
    return content({name: value for name, value in vars(shard).items() if name != "_handlers"})


def by_the_machine(shard: Shard, message: Any, caller: Any) -> Any:
    return shard.receive(message, caller)


def the_short_way(shard: Shard, message: Any, caller: Any) -> Any:
    if isinstance(message, msg.Push):
        before = held_by(shard)
        is_due = enter_push(shard, message, caller)
        if is_due is not None:
            return [Compute(Work.STEP)] if is_due else []
        assert held_by(shard) == before
    return shard.receive(message, caller)


def outcome_of(deliver: Deliver, shard: Shard, message: Any, caller: Any) -> Any:
    """What a message brings, and all that the shard holds then."""
    try:
        effects: Any = deliver(shard, message, caller)
    except DistNadamError as error:
        effects = repr(error)
    return content(effects), held_by(shard)


@st.composite
def pushes(draw: st.DrawFn) -> Callable[[Shard], Any]:
    rank = draw(st.integers(-1, RANKS))
    behind = draw(st.sampled_from([0] * 9 + [-1, 1]))
    which = draw(st.sampled_from(["round", "epoch", "incarnation"]))
    changes: dict[str, Any] = draw(
        st.sampled_from(
            [{}] * 6 + [{"rejection": "NaN"}, {"settings": RoundSettings(micro_steps=2)}] + RATED
        )
    )

    def made(shard: Shard) -> msg.Push:
        made = push(shard, rank, **changes)
        return dataclasses.replace(made, **{which: getattr(made, which) + behind})

    return made


def note(shard: Shard, rank: int) -> msg.PushNote:
    older = max(1, shard.members.ledger.newest[rank] - 1)
    return dataclasses.replace(push(shard, rank).note, incarnation=older)


RANK = st.integers(0, RANKS - 1)
OTHERS: st.SearchStrategy[Callable[[Shard], Any]] = st.one_of(
    RANK.map(lambda rank: lambda shard: msg.Join(rank=rank)),
    RANK.map(lambda rank: lambda shard: msg.Leave(rank, shard.members.ledger.newest[rank])),
    RANK.map(lambda rank: lambda shard: msg.WorkerDied(rank, shard.members.ledger.newest[rank])),
    RANK.map(lambda rank: lambda shard: orders.AbandonRank(rank, 1)),
    RANK.map(lambda rank: lambda shard: msg.CompletePush(rank, note(shard, rank), GRADIENTS)),
    RANK.map(lambda rank: lambda shard: msg.Pull(rank=rank, incarnation=1, at_least=1)),
    st.sets(RANK, min_size=1).map(
        lambda ranks: (
            lambda shard: orders.Reconfigure(
                epoch=shard.epochs.now + 1,
                schedule=((shard.progress.round + 1, tuple(sorted(ranks))),),
            )
        )
    ),
    st.sampled_from(
        [
            lambda shard: msg.Pause("me"),
            lambda shard: msg.CatchUp("me", shard.progress.round + 1),
            lambda shard: msg.Resume("me"),
            lambda shard: msg.SetConfig("me", NadamConfig(clipnorm=1.0), 1),
            lambda shard: msg.Step(
                token="me",
                incarnation=1,
                round=shard.progress.round + 1,
                gradients=GRADIENTS,
            ),
            lambda shard: orders.AttachStandby(None),
            lambda shard: orders.Load(epoch=shard.epochs.now + 1, params=GRADIENTS),
        ]
    ),
)
END_OF_WORK = "the work that was asked for ends"


def end_work(shard: Shard, _: Any, __: Any) -> Any:
    clock = Clock(shard.progress.round + 1, 0.5)
    if shard.phase is Phase.STEPPING:
        return shard.computed(Work.STEP, (clock, 0.002))
    if shard.phase is Phase.MEASURING:
        norms = msg.PartialNorms(shard.progress.round + 1, ((0, np.array([3.0])),))
        return shard.computed(Work.MEASURE, norms)
    if shard.phase is Phase.LOADING:
        is_load = isinstance(shard.loads.first, orders.Load)
        loaded = dataclasses.replace(shard.progress.control_state(), epoch=shard.epochs.now)
        return shard.computed(Work.LOAD_OR_COPY, loaded if is_load else shard.progress.round)
    return []


@given(
    st.lists(
        st.one_of(pushes(), pushes(), pushes(), st.just(END_OF_WORK), st.just(END_OF_WORK), OTHERS),
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None)
def test_the_short_way_and_the_machine_are_the_same_whatever_comes(story: list[Any]) -> None:
    shards = new_shard(), new_shard()
    for number, event in enumerate(story):
        if event is END_OF_WORK:
            found = [outcome_of(end_work, shard, None, None) for shard in shards]
        else:
            ways: tuple[Deliver, Deliver] = (by_the_machine, the_short_way)
            found = [
                outcome_of(deliver, shard, event(shard), number)
                for deliver, shard in zip(ways, shards, strict=True)
            ]
        assert found[0] == found[1]


def test_a_round_of_all_ranks_goes_the_short_way() -> None:
    shard = new_shard()
    for number in (1, 2):
        entered = [enter_push(shard, push(shard, rank), rank) for rank in (2, 0, 1)]
        assert (entered, shard.phase) == ([False, False, True], Phase.STEPPING)
        assert [waiter.caller for waiter in shard.rounds.current.waiting] == [2, 0, 1]
        end_work(shard, None, None)
        assert shard.progress.round == number


def test_rates_of_one_step_go_the_short_way_where_all_ranks_have_them() -> None:
    shard = new_shard()
    rates: dict[str, Any] = RATED[0]
    entered = [enter_push(shard, push(shard, rank, **rates), rank) for rank in (2, 0, 1)]
    assert (entered, shard.rounds.current.overrides) == ([False, False, True], RATES[0])
    end_work(shard, None, None)
    assert shard.progress.overrides == RATES[0]
    assert enter_push(shard, push(shard, 0, **rates), 0) is False
    for changes in ({}, *RATED[2:]):
        assert enter_push(shard, push(shard, 1, **changes), 1) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 1},
        {"incarnation": 2},
        {"round": 2},
        {"rank": 3},
        {"rejection": "NaN"},
        {"settings": RoundSettings(found_inf=True)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_push_that_is_not_ordinary_is_left_to_the_machine(changes: dict[str, Any]) -> None:
    shard = new_shard()
    changed = dataclasses.replace(push(shard, 0), **changes)
    assert enter_push(shard, changed, "caller") is None


def test_norms_holds_orders_and_ranks_given_up_are_left_to_the_machine() -> None:
    clipping = new_shard(clipnorm=1.0)
    assert enter_push(clipping, push(clipping, 0), 0) is None
    held = new_shard()
    held.receive(msg.Pause("me"), "hold")
    assert enter_push(held, push(held, 0), 0) is None
    given_up = new_shard()
    given_up.receive(orders.AbandonRank(1, 1), "order")
    assert given_up.members.given_up
    assert enter_push(given_up, push(given_up, 0), 0) is None
    rejected = new_shard()
    rejected.receive(push(rejected, 1, rejection="NaN"), 1)
    assert enter_push(rejected, push(rejected, 0, settings=ORDINARY), 0) is None


def stepped(shard: Shard, deliver: Deliver, rounds: int) -> None:
    """Have the machine take rounds one by one."""
    for _ in range(rounds):
        for rank in range(RANKS):
            deliver(shard, push(shard, rank), "caller")
        clock = shard.progress.clock
        shard.computed(Work.STEP, (Clock(clock.iterations + 1, 0.5), 0.1))


@pytest.mark.parametrize("before", range(3))
@pytest.mark.parametrize("rounds", range(1, 6))
def test_rounds_counted_together_are_those_counted_one_by_one(before: int, rounds: int) -> None:
    one_by_one, together = new_shard(), new_shard()
    for shard in (one_by_one, together):
        stepped(shard, by_the_machine, before)
    pushes = [push(together, rank) for rank in range(RANKS)]
    assert may_go_ahead(together, pushes)
    stepped(one_by_one, by_the_machine, rounds)
    count_ahead(together, pushes, rounds, Clock(before + rounds, 0.5), 0.1)
    assert held_by(one_by_one) == held_by(together)


@settings(deadline=None)
@given(st.lists(st.one_of(pushes(), OTHERS), max_size=8))
def test_where_rounds_may_go_ahead_pushes_are_all_that_a_step_needs(
    messages: list[Callable[[Shard], Any]],
) -> None:
    shard = new_shard()
    stepped(shard, by_the_machine, 1)
    for message in messages:
        outcome_of(by_the_machine, shard, message(shard), "caller")
    usual = [push(shard, rank) for rank in range(RANKS)]
    if not may_go_ahead(shard, usual):
        return
    twin = copy.deepcopy(shard)
    stepped(shard, by_the_machine, 3)
    clock = Clock(twin.progress.clock.iterations + 3, 0.5)
    count_ahead(twin, usual, 3, clock, 0.1)
    assert held_by(shard) == held_by(twin)


@settings(deadline=None)
@given(st.lists(st.one_of(pushes(), OTHERS), max_size=6), st.lists(pushes(), max_size=3))
def test_pushes_that_close_a_round_together_leave_what_the_machine_does(
    messages: list[Callable[[Shard], Any]], last: list[Callable[[Shard], msg.Push]]
) -> None:
    shard = new_shard()
    for message in messages:
        outcome_of(by_the_machine, shard, message(shard), "caller")
    twin, before = copy.deepcopy(shard), held_by(shard)
    missing = [made(shard) for made in last] or [
        push(shard, rank) for rank in range(RANKS) if rank not in shard.rounds.current.pushes
    ]
    if not missing or not close(shard, *missing):
        assert held_by(shard) == before
        return
    effects = [outcome_of(by_the_machine, twin, each, None) for each in missing]
    assert effects[-1][0] == content([Compute(Work.STEP)])
    twin.rounds.current.waiting = [w for w in twin.rounds.current.waiting if w.caller is not None]
    assert held_by(shard) == held_by(twin)
