"""Taking a rank over: what must be adopted where, in the rules by themselves and in shards whose
pushes may not mix.
"""

from typing import Any

import numpy as np
import pytest

from distnadam.config import Options
from distnadam.errors import (
    IllegalMessage,
    LatePush,
    Reconfigured,
    Rewound,
    StaleEpoch,
    SupersededWorker,
    WorkerLost,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.messages import (
    CompletePush,
    Describe,
    Join,
    Joined,
    Pull,
    Push,
    PushNote,
    RoundResult,
    ShardSpec,
)
from distnadam.protocol.orphaned_push import orphaned_pushes
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.supervisor_messages import AbandonRank, Load, Reconfigure
from distnadam.runtime.shard_host import ShardHost
from distnadam.shard.epochs import Epochs
from distnadam.tensors.layout import Layout

NOTE, OLDER = (
    PushNote(incarnation=1, round=5, dtypes={"float32": "float32"}),
    PushNote(incarnation=1, round=4, dtypes={"float32": "float32"}),
)
LAYOUT = Layout.of({"w": np.ones(4, np.float32)})


@pytest.mark.parametrize(
    ("joined", "adopting"),
    [
        ([Joined(incarnation=2, round=4), Joined(incarnation=2, round=4)], []),
        (
            [
                Joined(incarnation=2, round=5, committed=NOTE),
                Joined(incarnation=2, round=4, committed=OLDER),
            ],
            [1],
        ),
        ([Joined(incarnation=2, round=4, committed=NOTE), Joined(incarnation=2, round=4)], [1]),
        (
            [
                Joined(incarnation=2, round=5, committed=NOTE),
                Joined(incarnation=2, round=4, committed=NOTE),
            ],
            [],
        ),
        (
            [
                Joined(incarnation=2, round=5, committed=NOTE),
                Joined(incarnation=2, round=5, committed=NOTE),
            ],
            [],
        ),
        (
            [
                Joined(incarnation=2, round=5),
                Joined(incarnation=2, round=4, committed=NOTE),
                Joined(incarnation=2, round=4, committed=OLDER),
            ],
            [2],
        ),
    ],
)
def test_what_one_shard_counts_is_adopted_by_those_who_have_not(
    joined: list[Joined], adopting: list[int]
) -> None:
    assert orphaned_pushes(0, dict(enumerate(joined))) == {
        shard: CompletePush(0, NOTE) for shard in adopting
    }


def shard(**memory: Any) -> ShardHost:
    host = ShardHost(
        ShardSpec(
            index=0,
            num_shards=1,
            num_workers=2,
            replicas=0,
            name=None,
            config=NadamConfig(),
            options=Options(),
            layout=LAYOUT,
            ranges=LAYOUT.cuts(1)[0],
        )
    )
    for rank in (0, 1):
        host.send(Join(rank=rank)).result(0)
    return host


def push(
    rank: int,
    incarnation: int = 1,
    value: float = 1.0,
    epoch: int = 0,
    number: int = 1,
    settings: RoundSettings = ORDINARY,
) -> Push:
    return Push(
        epoch=epoch,
        rank=rank,
        incarnation=incarnation,
        round=number,
        gradients=None if settings.found_inf else {"float32": np.full(4, value, np.float32)},
        rejection="it overflowed" if settings.found_inf else None,
        settings=settings,
    )


def moment(host: ShardHost) -> float:
    return float(host.shard.state.m["float32"][0])


def test_a_push_on_one_of_two_shards_is_completed_from_memory_or_withdrawn_on_both() -> None:
    first, second = shard(), shard()
    second.gradients_of = lambda rank, incarnation, dtypes: {"float32": np.full(4, 7.0, np.float32)}
    first.send(push(1))
    first.send(push(0, value=7.0)).result(0)  # the round is applied there, and then its worker dies
    second.send(push(1))
    joined = {
        i: host.send(Join(rank=0, incarnation=2)).result(0)
        for i, host in enumerate((first, second))
    }
    adopts = orphaned_pushes(0, joined)
    assert list(adopts) == [1]
    second.send(adopts[1]).result(0)
    assert moment(first) == moment(second) and second.shard.progress.round == 1

    lacking = shard()
    with pytest.raises(
        IllegalMessage, match="the gradients of worker 1 for round 1 are not available any more"
    ):
        lacking.send(
            CompletePush(0, PushNote(incarnation=1, round=1, dtypes={"float32": "float32"}))
        ).result(0)


RATE = packed_overrides(0.5, (0.9, 0.9), None)


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        (RoundSettings(micro_steps=2, overrides=RATE), "applied"),
        (RoundSettings(found_inf=True), "voted"),
    ],
)
def test_a_push_is_completed_with_what_its_rank_said_of_the_round(
    settings: RoundSettings, outcome: str
) -> None:
    first, second = shard(), shard()
    second.gradients_of = lambda rank, incarnation, dtypes: {"float32": np.full(4, 7.0, np.float32)}
    others = RoundSettings(micro_steps=2, overrides=RATE)
    first.send(push(1, settings=others))
    decided = first.send(push(0, value=7.0, settings=settings)).result(0)
    waits = second.send(push(1, settings=others))
    joined = {
        i: host.send(Join(rank=0, incarnation=2)).result(0)
        for i, host in enumerate((first, second))
    }
    adopts = orphaned_pushes(0, joined)
    assert [message.note.settings for message in adopts.values()] == [settings]
    second.send(adopts[1]).result(0)
    completed = waits.result(0)
    for result in (decided, completed):
        assert (result.round, result.outcome) == (1, outcome)
    assert decided.rejection == completed.rejection
    assert moment(first) == moment(second)
    assert first.shard.progress.counted == second.shard.progress.counted
    assert first.shard.progress.lr == second.shard.progress.lr
    assert (first.shard.progress.lr == 0.5) == (outcome == "applied")


def test_a_successors_push_never_replaces_one_that_was_adopted() -> None:
    host = shard()
    old = host.send(push(0, value=7.0))
    note = PushNote(incarnation=1, round=1, dtypes={"float32": "float32"})
    assert host.send(Join(rank=0, incarnation=2)).result(0).committed is None, (
        "set aside: nobody counts it"
    )
    host.send(CompletePush(0, note)).result(0)
    assert host.send(Join(rank=0, incarnation=3)).result(0).committed == note, (
        "as good as counted from here on"
    )
    late = host.send(push(0, incarnation=3, value=9.0))
    host.send(push(1, value=7.0)).result(0)
    assert np.isclose(moment(host), 7.0 * (1 - 0.9))
    assert isinstance(old.result(0), RoundResult)
    with pytest.raises(
        LatePush, match="completed with the push of worker 1; this push did not count"
    ):
        late.result(0)


def test_a_successors_push_replaces_one_that_was_set_aside() -> None:
    host = shard()
    old = host.send(push(0, value=7.0))
    host.send(Join(rank=0, incarnation=2)).result(0)
    host.send(push(0, incarnation=2, value=3.0))
    with pytest.raises(SupersededWorker, match="the push of worker 1 was not counted"):
        old.result(0)
    host.send(push(1, value=3.0)).result(0)
    assert np.isclose(moment(host), 3.0 * (1 - 0.9))


def test_giving_up_a_rank_tells_who_waits_unless_somebody_has_taken_it_over() -> None:
    host = shard()
    host.send(Join(rank=0, incarnation=2)).result(0)
    waits = host.send(push(1))
    host.send(AbandonRank(0, 1)).result(0)
    assert not waits.done(), "it was meant for the worker before"
    host.send(AbandonRank(0, 2)).result(0)
    with pytest.raises(
        WorkerLost, match="worker 0 died before it pushed for round 1 and nobody took it over"
    ):
        waits.result(0)
    assert host.send(Describe()).result(0).given_up == (0,)
    host.send(Join(rank=0, incarnation=3)).result(0)
    assert host.send(Describe()).result(0).given_up == ()


def test_a_member_that_departed_is_not_waited_for_from_that_round_on() -> None:
    host = shard()
    host.send(Reconfigure(epoch=1, schedule=((1, (0, 1)), (2, (1,))))).result(0)
    host.send(push(0, epoch=1))
    host.send(push(1, epoch=1)).result(0)
    host.send(push(1, epoch=1, number=2)).result(0)
    with pytest.raises(Reconfigured, match="rank 0: is no member of round 3"):
        host.send(push(0, epoch=1, number=3)).result(0)


def test_a_pull_for_a_round_of_before_a_rewind_is_told_so() -> None:
    host = shard()
    waits = host.send(Pull(rank=0, incarnation=1, at_least=3))
    host.send(Load(epoch=4, params={"float32": np.ones(4, np.float32)}, newest={0: 1})).result(0)
    for pull in (waits, host.send(Pull(rank=0, incarnation=1, at_least=3, epoch=0))):
        with pytest.raises(Rewound, match="all shards went back after a death, to round 0"):
            pull.result(0)
    assert host.send(Pull(rank=0, incarnation=1)).result(0).round == 0


def test_of_all_that_happened_since_the_gravest_is_told() -> None:
    epochs = Epochs()
    epochs.advance("reconfigured")
    epochs.advance("rewound", 5)
    epochs.advance("replaced")
    told = {epoch: type(epochs.refusal(epoch, "shard 0", 3)) for epoch in (0, 1, 5, 6, 7)}
    assert told == {0: Rewound, 1: Rewound, 5: StaleEpoch, 6: type(None), 7: StaleEpoch}
    again = Epochs()
    again.restore(epochs.history)
    again.advance("reconfigured", 2)
    assert (again.now, again.reason) == (6, "reconfigured")


def test_a_number_that_was_given_away_is_never_given_again_though_the_state_goes_back() -> None:
    host = shard()
    assert host.send(Join(rank=0)).result(0).incarnation == 2
    host.send(Load(epoch=4, params={"float32": np.ones(4, np.float32)})).result(0)
    assert host.send(Join(rank=0)).result(0).incarnation == 3


def test_two_processes_that_were_given_one_number_by_two_shards_never_hold_the_rank_together() -> (
    None
):
    host = shard()
    host.send(Join(rank=0, incarnation=5, process="here")).result(0)
    host.send(Join(rank=0, incarnation=5, process="here")).result(0)
    with pytest.raises(SupersededWorker, match="the number 5 was given to another process too"):
        host.send(Join(rank=0, incarnation=5, process="there")).result(0)
    host.send(Join(rank=0, incarnation=5, reserve=True)).result(0)
    assert host.send(Describe()).result(0).live_owners == {0: (5, "here"), 1: (1, "")}
