"""The shard's state machine by itself: which message is legal when, that a refused one changes
nothing, and what a broken shard says.
"""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders
from distnadam.config import Options
from distnadam.errors import (
    CheckpointError,
    DistNadamError,
    IllegalMessage,
    LifecycleError,
    Reconfigured,
    ShardLost,
    StaleEpoch,
    WorkerLost,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.shard.effects import Answer, Compute, Work
from distnadam.shard.ledger import DIRECT
from distnadam.shard.machine import Shard
from distnadam.shard.phases import LEGAL, NEXT, Phase
from distnadam.shard.state import ShardState
from distnadam.tensors.layout import Layout

LAYOUT = Layout.of({"w": np.ones(3, np.float32)})
GRADIENTS = {"float32": np.ones(3, np.float32)}
MEASURED = msg.PartialNorms(1, ((0, np.array([3.0])),))


def new_shard(**config: Any) -> Shard:
    ranges = LAYOUT.cuts(1)[0]
    return Shard(
        ShardSpec(
            index=0,
            num_shards=1,
            num_workers=2,
            replicas=0,
            name=None,
            config=NadamConfig(**config),
            options=Options(),
            layout=LAYOUT,
            ranges=ranges,
        ),
        ShardState.empty(ranges),
    )


def push(rank: int, decided: int = 1, rejection: str | None = None, **settings: Any) -> msg.Push:
    return msg.Push(
        epoch=0,
        rank=rank,
        incarnation=1,
        round=decided,
        gradients=GRADIENTS,
        rejection=rejection,
        settings=RoundSettings(**settings) if settings else ORDINARY,
    )


def shard_in(phase: Phase) -> Shard:
    """A shard with two workers, held by "me", that was led to a phase by messages alone."""
    shard = new_shard(clipnorm=1.0)
    for rank in (0, 1):
        shard.receive(msg.Join(rank=rank), "join")
    if phase in (Phase.COLLECTING, Phase.LOADING, Phase.EMPTY):
        shard.receive(msg.Pause("me"), "hold")
        if phase is not Phase.COLLECTING:
            shard.receive(orders.Load(epoch=7, directory="directory"), "load")
        if phase is Phase.EMPTY:
            shard.computed(Work.LOAD_OR_COPY, CheckpointError("file: a bit is wrong"))
        return shard
    for rank in (0, 1):
        shard.receive(push(rank), f"push {rank}")
    if phase is Phase.MEASURING:
        return shard
    shard.computed(Work.MEASURE, MEASURED)
    if phase is Phase.AWAITING_NORMS:
        shard.receive(msg.Pause("me"), "hold")
        return shard
    shard.receive(
        msg.TotalNorms(epoch=0, rank=0, incarnation=1, round=1, square_sums=np.array([3.0])),
        "norms 0",
    )
    if phase is Phase.BROKEN:
        shard.broke(MemoryError("no room"))
    return shard


def replies(effects: Any) -> list[Any]:
    """What is answered, in order."""
    return [effect.reply for effect in effects if isinstance(effect, Answer)]


def fingerprint(shard: Shard) -> bytes:
    """Everything a shard holds; what a refused message must leave as it is."""
    return pickle.dumps(vars(shard))


EXAMPLES: list[Any] = [
    msg.Join(rank=0),
    push(0),
    msg.GroupPush(
        epoch=0,
        round=1,
        members={1: msg.PushNote(incarnation=1, round=1, dtypes={"float32": "float32"})},
        gradients=GRADIENTS,
    ),
    msg.TotalNorms(epoch=0, rank=0, incarnation=1, round=1, square_sums=np.array([3.0])),
    msg.Pull(rank=0, incarnation=1),
    msg.Leave(0, 1),
    msg.WorkerDied(0, 1),
    msg.CompletePush(
        0, msg.PushNote(incarnation=1, round=1, dtypes={"float32": "float32"}), GRADIENTS
    ),
    orders.Reconfigure(epoch=9, schedule=((1, (0, 1)),)),
    orders.Load(epoch=9, params=GRADIENTS),
    orders.AttachStandby(None),
    orders.AbandonRank(0, 1),
    orders.Retire(9),
    msg.Pause("you"),
    msg.CatchUp("me", 1),
    msg.Resume("you"),
    msg.Read("me", ("m",)),
    msg.Write(token="me", state={}),
    msg.SetConfig("me", NadamConfig(lr=0.1), 1),
    msg.Step(token="me", incarnation=1, round=1, gradients=GRADIENTS),
    msg.StepNorms("me", np.array([3.0])),
]


@pytest.mark.parametrize("phase", list(Phase), ids=lambda p: p.name)
@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_is_taken_where_the_table_says_so_and_otherwise_changes_nothing(
    message: Any, phase: Phase
) -> None:
    shard = shard_in(phase)
    assert shard.phase is phase
    before, refusal = fingerprint(shard), None
    try:
        shard.receive(message, "caller")
    except DistNadamError as error:
        refusal = error
    out_of_phase = (
        isinstance(refusal, ShardLost)
        if phase in (Phase.BROKEN, Phase.EMPTY)
        else "is not legal while" in str(refusal)
    )
    assert out_of_phase == (type(message) not in LEGAL[phase])
    assert refusal is None or fingerprint(shard) == before


CHANGES = [(one, other) for one in Phase for other in Phase if other in NEXT[one]]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=lambda phase: phase.name)
def test_every_change_of_phase_in_the_table_can_happen(before: Phase, after: Phase) -> None:
    shard = shard_in(before)
    loaded = dataclasses.replace(shard.progress.control_state(), epoch=7)
    norms = msg.TotalNorms(epoch=0, rank=0, incarnation=1, round=1, square_sums=np.array([3.0]))
    ways: dict[tuple[Phase, Phase], Callable[[], Any]] = {
        (Phase.COLLECTING, Phase.COLLECTING): lambda: shard.receive(
            msg.Write(token="me", state={}), ""
        ),
        (Phase.COLLECTING, Phase.MEASURING): lambda: push_of_both(shard),
        (Phase.COLLECTING, Phase.STEPPING): lambda: push_of_both(new_shard_instead()),
        (Phase.COLLECTING, Phase.LOADING): lambda: shard.receive(orders.Load(epoch=7), ""),
        (Phase.MEASURING, Phase.AWAITING_NORMS): lambda: shard.computed(Work.MEASURE, MEASURED),
        (Phase.AWAITING_NORMS, Phase.COLLECTING): lambda: shard.receive(
            msg.Write(token="me", state={}), ""
        ),
        (Phase.AWAITING_NORMS, Phase.STEPPING): lambda: [
            shard.receive(msg.Resume("me"), ""),
            shard.receive(norms, ""),
        ],
        (Phase.AWAITING_NORMS, Phase.LOADING): lambda: shard.receive(orders.Load(epoch=7), ""),
        (Phase.STEPPING, Phase.COLLECTING): lambda: shard.refused(DistNadamError("no rate")),
        (Phase.LOADING, Phase.COLLECTING): lambda: shard.computed(Work.LOAD_OR_COPY, loaded),
        (Phase.LOADING, Phase.EMPTY): lambda: shard.computed(
            Work.LOAD_OR_COPY, CheckpointError("a bit is wrong")
        ),
        (Phase.EMPTY, Phase.LOADING): lambda: shard.receive(orders.Load(epoch=8), ""),
    }

    def new_shard_instead() -> Shard:
        nonlocal shard
        shard = new_shard()
        for rank in (0, 1):
            shard.receive(msg.Join(rank=rank), "")
        return shard

    if after is Phase.BROKEN:
        shard.receive(orders.Retire(9), "")
    else:
        ways[before, after]()
    assert shard.phase is after


def push_of_both(shard: Shard) -> None:
    """Push for both ranks, with nobody holding the shard."""
    shard.receive(msg.Resume("me"), "")
    for rank in (0, 1):
        shard.receive(push(rank), "")


@pytest.mark.parametrize(
    ("phase", "work", "result"),
    [
        (Phase.MEASURING, Work.MEASURE, MEASURED),
        (Phase.STEPPING, Work.STEP, (Clock(1, 0.9), 0.002)),
        (Phase.LOADING, Work.LOAD_OR_COPY, CheckpointError("a bit is wrong")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_work_that_ends_after_the_shard_was_retired_changes_nothing(
    phase: Phase, work: Work, result: Any
) -> None:
    shard = shard_in(phase)
    shard.receive(orders.Retire(9), "retire")
    before = fingerprint(shard)
    assert shard.computed(work, result) == []
    assert shard.broke(MemoryError("no room")) == []
    assert shard.refused(DistNadamError("no rate")) == []
    assert shard.describe().retired and fingerprint(shard) == before


def test_every_message_has_an_example() -> None:
    assert {type(m) for m in EXAMPLES} == set().union(*LEGAL.values())


def test_a_round_asks_for_a_step_once_all_ranks_have_pushed_and_answers_all_of_them() -> None:
    shard = new_shard()
    for rank in (0, 1):
        shard.receive(msg.Join(rank=rank), None)
    assert shard.receive(push(1), "one") == []
    assert shard.receive(push(0), "zero") == [Compute(Work.STEP)]
    answers = shard.computed(Work.STEP, (Clock(1, 0.9), 0.002))
    assert [
        (a.caller, a.reply.round, a.reply.outcome) for a in answers if isinstance(a, Answer)
    ] == [
        ("one", 1, "applied"),
        ("zero", 1, "applied"),
    ]


def test_a_step_from_outside_waits_for_no_rank() -> None:
    shard = new_shard()
    shard.receive(msg.Pause("me"), "hold")
    step = msg.Step(token="me", incarnation=1, round=1, gradients=GRADIENTS)
    assert shard.receive(step, "step") == [Compute(Work.STEP)]


@pytest.mark.parametrize(("on_nonfinite", "outcome"), [("raise", "refused"), ("skip", "skipped")])
def test_a_complaint_ends_the_round_with_no_step_and_names_every_culprit(
    on_nonfinite: Any, outcome: str
) -> None:
    shard = new_shard()
    shard.spec = ShardSpec(
        index=0,
        num_shards=1,
        num_workers=2,
        replicas=0,
        name=None,
        config=NadamConfig(),
        options=Options(on_nonfinite=on_nonfinite),
        layout=LAYOUT,
        ranges=shard.spec.ranges,
    )
    for rank in (0, 1):
        shard.receive(msg.Join(rank=rank), None)
    shard.receive(push(1, rejection="worker 1: NaN"), "one")
    answers = shard.receive(push(0, rejection="worker 0: NaN"), "zero")
    assert [(a.reply.outcome, a.reply.rejection) for a in answers if isinstance(a, Answer)] == [
        (outcome, "worker 0: NaN; worker 1: NaN")
    ] * 2
    assert (shard.progress.round, shard.progress.skipped, shard.progress.clock.iterations) == (
        1,
        1,
        0,
    )


@pytest.mark.parametrize("config", [{}, {"clipnorm": 1.0}])
@pytest.mark.parametrize(
    ("pushes", "outcome", "why"),
    [
        ([push(1, rejection="one", found_inf=True), push(0)], "voted", "one"),
        (
            [push(1, micro_steps=3), push(0, micro_steps=4)],
            "disagreed",
            "micro_steps must be equal on all ranks: rank 0 has 4, rank 1 has 3",
        ),
    ],
)
def test_a_vote_and_counts_that_differ_end_the_round_for_all_and_the_next_is_stepped(
    pushes: list[msg.Push], outcome: str, why: str, config: dict[str, Any]
) -> None:
    for order in (pushes, pushes[::-1]):
        shard = new_shard(**config)
        for rank in (0, 1):
            shard.receive(msg.Join(rank=rank), None)
        assert replies(shard.receive(order[0], "first")) == []
        effects = shard.receive(order[1], "last")
        assert [(reply.outcome, reply.rejection) for reply in replies(effects)] == [
            (outcome, why)
        ] * 2
        assert not any(isinstance(effect, Compute) for effect in effects)
        progress = shard.progress
        assert (progress.round, progress.skipped, progress.clock.iterations) == (1, 1, 0)
        assert progress.counted == {each.rank: each.note for each in pushes}
        record = progress.control_state()
        assert (record.outcome, record.counted) == (outcome, progress.counted)
        again = shard.receive(order[0], "again")
        assert [(a.caller, a.reply.outcome) for a in again if isinstance(a, Answer)] == [
            ("again", outcome)
        ]
        shard.receive(push(0, 2, micro_steps=2), "next")
        work = Work.MEASURE if config else Work.STEP
        assert shard.receive(push(1, 2, micro_steps=2), "next") == [Compute(work)]


def test_a_step_from_outside_that_overflowed_is_skipped() -> None:
    shard = new_shard()
    shard.receive(msg.Pause("me"), "hold")
    step = msg.Step(
        token="me",
        incarnation=1,
        round=1,
        gradients=None,
        rejection="overflowed",
        settings=RoundSettings(found_inf=True),
    )
    (reply,) = replies(shard.receive(step, "step"))
    assert (reply.outcome, reply.rejection, reply.iterations) == ("voted", "overflowed", 0)
    assert shard.progress.counted[DIRECT].settings.found_inf


@pytest.mark.parametrize("phase", [Phase.MEASURING, Phase.AWAITING_NORMS])
def test_a_shard_whose_norms_nobody_is_left_to_send_tells_those_who_join(phase: Phase) -> None:
    shard = shard_in(phase)
    assert [replies(shard.receive(msg.Join(rank=rank), "join"))[0].orphaned for rank in (0, 1)] == [
        False,
        True,
    ]
    assert not replies(shard_in(Phase.COLLECTING).receive(msg.Join(rank=0), "join"))[0].orphaned


def test_a_norm_that_overflows_refuses_the_round_and_names_the_tensor() -> None:
    shard = shard_in(Phase.MEASURING)
    shard.computed(Work.MEASURE, MEASURED)
    answers = shard.receive(
        msg.TotalNorms(epoch=0, rank=0, incarnation=1, round=1, square_sums=np.array([np.inf])),
        "norms",
    )
    assert "the mean gradient of 'w' overflows" in replies(answers)[0].rejection
    assert shard.phase is Phase.COLLECTING


def test_a_broken_shard_answers_everyone_who_waits_and_then_serves_no_one() -> None:
    shard = shard_in(Phase.STEPPING)
    shard.receive(msg.Pull(rank=0, incarnation=1, at_least=1), "pull")
    shard.receive(msg.Pause("later"), "hold")
    callers = {a.caller for a in shard.broke(MemoryError("no room")) if isinstance(a, Answer)}
    assert {"norms 0", "pull", "hold"} <= callers
    with pytest.raises(ShardLost, match="broken by MemoryError: no room"):
        shard.receive(push(0), "late")


def test_holders_take_turns_and_rounds_wait_for_the_last_of_them() -> None:
    shard = new_shard()
    for rank in (0, 1):
        shard.receive(msg.Join(rank=rank), None)
    assert [a.caller for a in shard.receive(msg.Pause("a"), "a")] == ["a"]  # type: ignore[union-attr]
    assert shard.receive(msg.Pause("b"), "b") == []
    shard.receive(push(0), "zero")
    assert shard.receive(push(1), "one") == [], "a held shard begins no round"
    released = shard.receive(msg.Resume("a"), "release a")
    assert [a.caller for a in released if isinstance(a, Answer)] == ["release a", "b"]
    assert Compute(Work.STEP) not in released
    assert Compute(Work.STEP) in shard.receive(msg.Resume("b"), "release b")


def test_a_holder_may_let_a_late_shard_complete_a_round() -> None:
    shard = new_shard()
    for rank in (0, 1):
        shard.receive(msg.Join(rank=rank), None)
    shard.receive(msg.Pause("a"), "a")
    for rank in (0, 1):
        shard.receive(push(rank), f"push {rank}")
    assert Compute(Work.STEP) in shard.receive(msg.CatchUp("a", 1), "advance")
    answers = [
        a.caller for a in shard.computed(Work.STEP, (Clock(1, 0.9), 0.002)) if isinstance(a, Answer)
    ]
    assert answers == ["push 0", "push 1", "advance"]


def test_only_the_holder_reads_and_writes() -> None:
    shard = shard_in(Phase.COLLECTING)
    for message in (
        msg.Read("you", ("m",)),
        msg.Write(token="you", state={}),
        msg.SetConfig("you", NadamConfig(), 1),
        msg.Step(token="you", incarnation=1, round=1, gradients=GRADIENTS),
        msg.CatchUp("you", 1),
    ):
        with pytest.raises(
            IllegalMessage, match="legal only between Pause and Resume of the same caller"
        ):
            shard.receive(message, None)


def test_a_pause_answers_with_the_hyper_parameters_that_the_next_step_uses() -> None:
    shard = new_shard()
    (first,) = replies(shard.receive(msg.Pause("a"), "a"))
    shard.receive(msg.SetConfig("a", NadamConfig(lr=0.25), 7), "config")
    shard.receive(msg.Resume("a"), "resume")
    (second,) = replies(shard.receive(msg.Pause("b"), "b"))
    assert (first.config, first.revision) == (NadamConfig(), 0)
    assert (second.config, second.revision) == (NadamConfig(lr=0.25), 7)


def test_a_write_refuses_the_pushes_that_wait_and_raises_the_epoch() -> None:
    shard = shard_in(Phase.COLLECTING)
    shard.receive(push(0), "zero")
    answers = shard.receive(msg.Write(token="me", state={}), "write")
    assert isinstance(replies(answers)[0], StaleEpoch)
    assert shard.epochs.now == 1
    with pytest.raises(StaleEpoch, match="message of epoch 0, expected 1: the state was replaced"):
        shard.receive(push(0), "late")


@pytest.mark.parametrize("what", [msg.Join(rank=2), msg.Leave(2, 0), msg.WorkerDied(2, 0)])
def test_a_rank_that_does_not_exist_is_refused(what: Any) -> None:
    shard = new_shard()
    with pytest.raises(LifecycleError, match=r"rank must be in \[0, 2\), got 2"):
        shard.receive(what, None)
    assert not shard.members.dead and not shard.members.left


def test_the_death_of_a_worker_that_never_joined_is_nobodys() -> None:
    shard = new_shard()
    assert replies(shard.receive(msg.WorkerDied(1, 0), "who")) == [None]
    assert not shard.members.dead


def test_norms_of_other_tensors_are_refused_and_the_right_ones_still_count() -> None:
    shard = shard_in(Phase.MEASURING)
    shard.computed(Work.MEASURE, MEASURED)
    norms = msg.TotalNorms(epoch=0, rank=0, incarnation=1, round=1, square_sums=np.ones(2))
    with pytest.raises(IllegalMessage, match=r"norms of shape \(2,\), expected one for each of 1"):
        shard.receive(norms, "norms")
    effects = shard.receive(dataclasses.replace(norms, square_sums=np.ones(1)), "norms")
    assert Compute(Work.STEP) in effects


def test_a_load_goes_before_an_attach_that_waits_for_norms_which_may_never_come() -> None:
    shard = shard_in(Phase.AWAITING_NORMS)
    assert shard.receive(orders.AttachStandby("standby"), "attach") == []
    effects = shard.receive(orders.Load(epoch=9, params=GRADIENTS), "load")
    assert effects[-1] == Compute(Work.LOAD_OR_COPY) and isinstance(shard.loads.first, orders.Load)
    loaded = orders.ShardControlState(
        epoch=9,
        round=4,
        skipped=0,
        clock=Clock(4, 0.9),
        lr=0.0,
        active=0,
        outcome="applied",
        rejection=None,
        ledger={"runs": [], "newest": []},
    )
    after = shard.computed(Work.LOAD_OR_COPY, loaded)
    assert (
        Answer("load", 4) in after
        and after[-1] == Compute(Work.LOAD_OR_COPY)
        and isinstance(shard.loads.first, orders.AttachStandby)
    )


def test_a_load_of_an_epoch_that_has_passed_is_refused() -> None:
    shard = shard_in(Phase.STEPPING)
    shard.receive(orders.Load(epoch=9, params=GRADIENTS), "first")
    shard.receive(orders.Load(epoch=8, params=GRADIENTS), "second")
    shard.computed(Work.STEP, (Clock(1, 0.9), 0.002))
    loaded = orders.ShardControlState(
        epoch=9,
        round=0,
        skipped=0,
        clock=Clock(),
        lr=0.0,
        active=0,
        outcome="applied",
        rejection=None,
        ledger={"runs": [], "newest": []},
    )
    assert isinstance(replies(shard.computed(Work.LOAD_OR_COPY, loaded))[-1], IllegalMessage)
    assert shard.phase is Phase.COLLECTING


@pytest.mark.parametrize(
    "answered", ["while it loads", "once it has loaded", "once that has failed"]
)
def test_a_load_that_is_asked_for_again_is_carried_out_once_and_answered_as_it_ended(
    answered: str,
) -> None:
    shard, control_state, refused = (
        new_shard(),
        new_shard().progress.control_state(),
        CheckpointError("file: a bit is wrong"),
    )
    shard.receive(orders.Load(epoch=9, directory="directory"), "first")
    effects = (
        shard.receive(orders.Load(epoch=9, directory="directory"), "again")
        if answered == "while it loads"
        else []
    )
    effects += shard.computed(
        Work.LOAD_OR_COPY,
        refused if "failed" in answered else dataclasses.replace(control_state, round=4),
    )
    effects += (
        shard.receive(orders.Load(epoch=9, directory="directory"), "again")
        if answered != "while it loads"
        else []
    )
    ended = refused if "failed" in answered else 4
    assert [e for e in effects if isinstance(e, (Answer, Compute))] == [
        Answer("first", ended),
        Answer("again", ended),
    ]


def test_a_reign_that_was_obeyed_already_changes_nothing() -> None:
    shard = shard_in(Phase.COLLECTING)
    reconfigure = orders.Reconfigure(epoch=3, schedule=((1, (0,)),))
    assert len(shard.receive(reconfigure, "one")) == 2
    before = fingerprint(shard)
    assert shard.receive(reconfigure, "again") == [Answer("again", 3)]
    assert shard.receive(orders.Reconfigure(epoch=2, schedule=((1, (1,)),)), "older") == [
        Answer("older", 3)
    ]
    assert fingerprint(shard) == before


def test_each_refusal_of_a_broken_shard_raises_an_error_of_its_own() -> None:
    retired = shard_in(Phase.COLLECTING)
    retired.receive(orders.Retire(9), "retire")
    broken = shard_in(Phase.BROKEN)
    for shard in (retired, broken):
        raised = []
        for _ in range(2):
            with pytest.raises(DistNadamError) as caught:
                shard.receive(push(0), None)
            raised.append(caught.value)
        first, second = raised
        assert first is not second
        assert (type(first), str(first)) == (type(second), str(second))
        assert vars(first) == vars(second)
    assert isinstance(first.__cause__, MemoryError)
    assert first.__cause__ is second.__cause__
    with pytest.raises(Reconfigured) as reconfigured:
        retired.receive(push(0), None)
    assert (reconfigured.value.epoch, reconfigured.value.step) == (9, 0)


def test_those_who_wait_for_a_rank_given_up_during_a_copy_learn_it_at_its_end() -> None:
    shard = new_shard()
    for rank in (0, 1):
        shard.receive(msg.Join(rank=rank), "join")
    shard.receive(push(0), "zero")
    shard.receive(orders.AttachStandby("standby"), "attach")
    shard.receive(msg.WorkerDied(1, 1), "died")
    assert replies(shard.receive(orders.AbandonRank(1, 1), "abandon")) == [None]
    copied, lost = replies(shard.computed(Work.LOAD_OR_COPY, 0))
    assert copied == 0
    assert isinstance(lost, WorkerLost)
