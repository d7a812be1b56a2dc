"""A standby follows its primary to the bit, and goes on as it would have; one that is out of date
never steps in.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnadam.config import Options
from distnadam.errors import IllegalMessage
from distnadam.groups import Group
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.norms import tensor_square_sums
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.protocol.messages import (
    Join,
    PartialNorms,
    Pause,
    Push,
    Resume,
    SetConfig,
    ShardSpec,
    TotalNorms,
    Write,
)
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.supervisor_messages import (
    AttachStandby,
    Load,
    Reconfigure,
    ReplicatedRound,
)
from distnadam.runtime.shard_host import ShardHost
from distnadam.runtime.standby import Standby
from distnadam.schedules import Polynomial
from distnadam.shard.effects import Replicate
from distnadam.tensors.arrays import BFLOAT16, STATE_ARRAYS
from distnadam.tensors.layout import Layout
from tests.configurations import configurations
from tests.reference import State, state_of
from tests.simulation.stream import InProcessStream

SIZE = 1500
LAYOUT = Layout.of({"a": np.ones(SIZE - 7, np.float32), "b": np.ones(7, np.float32)})
INITIAL = {"float32": np.linspace(-1, 1, SIZE, dtype=np.float32)}


def pair(
    kernel: str = "numpy",
    workers: int = 2,
    layout: Layout = LAYOUT,
    *,
    maps: bool = False,
    **config: Any,
) -> tuple[ShardHost, Standby, ShardSpec]:
    options = Options(kernel=kernel, on_nonfinite="skip" if workers == 2 else "raise")  # type: ignore[arg-type]
    spec = ShardSpec(
        index=0,
        num_shards=1,
        num_workers=workers,
        replicas=1,
        name=None,
        config=NadamConfig(**config),
        options=options,
        layout=layout,
        ranges=layout.cuts(1)[0],
    )
    standby = Standby(spec)
    primary = ShardHost(spec)
    primary.connect_standby = lambda where, now, config, state: InProcessStream(
        standby, now, config, state if maps else state.arrays()
    )
    primary.send(Load(epoch=1, params=INITIAL)).result(0)
    for rank in range(workers):
        primary.send(Join(rank=rank)).result(0)
    primary.send(AttachStandby("there")).result(0)
    return primary, standby, spec


RATES = RoundSettings(overrides=packed_overrides({None: 0.3, "b": 0.1}, (0.7, 0.95), ["a", "b"]))


def do_round(
    host: ShardHost,
    number: int,
    seed: int,
    *,
    epoch: int = 1,
    workers: int = 2,
    finite: bool = True,
    settings: RoundSettings = ORDINARY,
    absent: tuple[frozenset[int], ...] = (),
) -> None:
    rng = np.random.default_rng(seed)
    for rank in range(workers):
        gradient = (
            {"float32": (10 * rng.standard_normal(SIZE)).astype(np.float32)} if finite else None
        )
        says = settings if rank == 0 else replace(settings, found_inf=False)
        if absent and gradient is not None:
            says = replace(says, absent=absent[rank])
            for index in absent[rank]:
                gradient["float32"][LAYOUT.tensors[index].begin : LAYOUT.tensors[index].end] = 0
        answer = host.send(
            Push(
                epoch=epoch,
                rank=rank,
                incarnation=1,
                round=number,
                gradients=gradient,
                rejection=None if finite else "NaN",
                settings=says,
            )
        )
    if isinstance(measured := answer.result(0), PartialNorms):
        host.send(
            TotalNorms(
                epoch=epoch,
                rank=0,
                incarnation=1,
                round=number,
                square_sums=tensor_square_sums(2, [measured.sums]),
            )
        ).result(0)


def same(one: State, other: State) -> bool:
    averages = [None if state.ema is None else state.ema.tobytes() for state in (one, other)]
    return (
        all(getattr(one, x).tobytes() == getattr(other, x).tobytes() for x in STATE_ARRAYS)
        and averages[0] == averages[1]
        and one.clock == other.clock
    )


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@settings(max_examples=15, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(
                [ORDINARY, RoundSettings(micro_steps=2), RoundSettings(found_inf=True), RATES]
            ),
            st.tuples(*[st.frozensets(st.integers(0, 1))] * 3),
        ),
        min_size=1,
        max_size=6,
    ),
    workers=st.integers(1, 3),
    maps=st.booleans(),
    config=configurations("a", "b"),
)
def test_promoted_after_any_rounds_it_has_the_primarys_bits_and_goes_on_as_it_would_have(
    kernel: str,
    rounds: list[tuple[bool, RoundSettings, tuple[frozenset[int], ...]]],
    workers: int,
    maps: bool,
    config: dict[str, Any],
) -> None:
    has_clocks = "clocks" in config
    layout = LAYOUT.for_workers(None, may_lack=has_clocks)
    primary, standby, _ = pair(kernel, workers, layout, maps=maps, **config)
    for number, (good, says, absent) in enumerate(rounds, 1):
        finite = good and not says.found_inf
        do_round(
            primary,
            number,
            number,
            workers=workers,
            finite=finite,
            settings=says,
            absent=absent if has_clocks else (),
        )
        is_vote = primary.shard.progress.outcome == "voted"
        assert is_vote == says.found_inf
        assert standby.reached == number
    promoted, control_state = standby.promote(
        Reconfigure(epoch=2, schedule=((1, tuple(range(workers))),)), ShardHost
    )
    assert same(state_of(promoted), state_of(primary))
    assert control_state.ledger == primary.shard.members.ledger.to_dict()
    for name in ("counted", "outcome", "rejection", "skipped", "overrides"):
        assert getattr(promoted.shard.progress, name) == getattr(primary.shard.progress, name)
    number = len(rounds) + 1
    do_round(primary, number, 99, workers=workers)
    do_round(promoted, number, 99, epoch=2, workers=workers)
    assert same(state_of(promoted), state_of(primary))


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("maps", [False, True])
def test_its_average_of_rounded_and_of_frozen_parameters_has_the_primarys_bits(
    kernel: str, every: int | None, maps: bool
) -> None:
    groups = [Group("b", trainable=False)]
    average = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": every}
    layout = LAYOUT.for_workers("bfloat16", [1])
    primary, standby, _ = pair(
        kernel, layout=layout, maps=maps, groups=groups, pull_dtype="bfloat16", **average
    )
    frozen = slice(SIZE - 7, SIZE)
    for number in range(1, 6):
        do_round(primary, number, number, finite=number != 3)
        ours, theirs = (
            flat["ema"]["float32"] for flat in (primary.shard.state.arrays(), standby.arrays)
        )
        assert ours.tobytes() == theirs.tobytes()
        assert ours[frozen].tobytes() == INITIAL["float32"][frozen].tobytes()
        overwritten = every is not None and primary.shard.progress.clock.iterations % every == 0
        params = primary.shard.state.params["float32"]
        assert (params.tobytes() == ours.tobytes()) == (overwritten or number == 1)
        assert primary.shard.state.seen["float32"].tobytes() == params.astype(BFLOAT16).tobytes()
    promoted, _ = standby.promote(Reconfigure(epoch=2, schedule=((1, (0, 1)),)), ShardHost)
    assert same(state_of(promoted), state_of(primary))


def test_it_knows_the_membership_and_the_epoch_of_the_last_reign() -> None:
    primary, standby, _ = pair()
    primary.send(Reconfigure(epoch=5, schedule=((1, (0, 1)), (3, (1,))), newest={0: 4})).result(0)
    promoted, control_state = standby.promote(Reconfigure(epoch=0, schedule=()), ShardHost)
    assert promoted.shard.members.schedule == ((1, (0, 1)), (3, (1,)))
    assert promoted.shard.members.ledger.newest[0] == 4
    assert control_state.epoch == 5 and promoted.shard.epochs.now == 6


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("replaced", ["written", "loaded"])
def test_one_whose_primary_went_on_without_it_never_steps_in(replaced: str, maps: bool) -> None:
    primary, standby, _ = pair(maps=maps)
    do_round(primary, 1, 1)
    if replaced == "written":
        primary.send(Pause("me")).result(0)
        primary.send(Write(token="me", state={"params": INITIAL})).result(0)
    else:
        primary.send(Load(epoch=2, params=INITIAL)).result(0)
    assert standby.reached is None
    with pytest.raises(IllegalMessage, match="has no state yet"):
        standby.promote(Reconfigure(epoch=3, schedule=()), ShardHost)


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("ends", ["steps", "writes", "writes moments"])
def test_what_it_maps_is_whole_while_its_primary_has_not_announced_more(
    kernel: str, ends: str
) -> None:
    layout, average = LAYOUT.for_workers("bfloat16", [1]), {"use_ema": True}
    primary, standby, _ = pair(
        kernel, layout=layout, maps=True, groups=[Group("b", trainable=False)], **average
    )
    for number in range(1, 4):
        do_round(primary, number, number)
    announced = state_of(primary)
    primary._outbox.carriers[Replicate] = lambda effect: None  # it dies before it announces more
    if ends == "steps":
        do_round(primary, 4, 4)
    else:
        primary.send(Pause("me")).result(0)
        names = ["m", "v"] if ends == "writes moments" else ["params"]
        write = Write(token="me", state=dict.fromkeys(names, INITIAL))
        primary.send(write).result(0)
        assert primary.shard.state.arrays()[names[0]]["float32"].tobytes() == (
            INITIAL["float32"].tobytes()
        )
    assert not same(state_of(primary), announced)
    promoted, _ = standby.promote(Reconfigure(epoch=9, schedule=((1, (0, 1)),)), ShardHost)
    assert same(state_of(promoted), announced)


def test_a_record_that_is_not_the_next_is_refused_and_the_standby_is_out_of_date() -> None:
    primary, standby, _ = pair()
    do_round(primary, 1, 1)
    clock = primary.shard.progress.clock
    with pytest.raises(IllegalMessage, match="standby of shard 0: expected round 2, got round 3"):
        standby.apply(
            ReplicatedRound(
                round=3,
                skipped=0,
                outcome="applied",
                rejection=None,
                counted={},
                lr=0.002,
                active=0,
                clock=clock,
            ),
            INITIAL,
        )
    assert standby.reached is None


def test_arrays_without_their_place_in_time_are_no_state() -> None:
    _, standby, _ = pair()
    standby.take_arrays(dict.fromkeys(STATE_ARRAYS, INITIAL))
    assert standby.reached is None


GROUPS = [Group("b", weight_decay=0.5, lr_scale=3.0, clipvalue=0.1)]


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
def test_it_steps_each_tensor_by_its_groups_settings(kernel: str) -> None:
    primary, standby, _ = pair(kernel, weight_decay=0.1, groups=GROUPS)
    for number in range(1, 4):
        do_round(primary, number, number)
    promoted, _ = standby.promote(Reconfigure(epoch=2, schedule=((1, (0, 1)),)), ShardHost)
    assert same(state_of(promoted), state_of(primary))
    alone, _, _ = pair(kernel, weight_decay=0.1)
    for number in range(1, 4):
        do_round(alone, number, number)
    assert not same(state_of(alone), state_of(primary)), "the groups' settings matter"


@pytest.mark.parametrize("number", [1, 2])
def test_frozen_tensors_of_a_state_that_is_loaded_anew_are_in_both_buffers(number: int) -> None:
    still = Group("b", trainable=False)
    layout = LAYOUT.for_workers(None, [1])
    host, _, _ = pair(workers=1, layout=layout, groups=[still])
    do_round(host, 1, 1, workers=1)
    loaded = {"float32": INITIAL["float32"] + 1}
    host.send(Load(epoch=2, params=loaded)).result(0)
    for step in range(1, number + 1):
        do_round(host, step, step, epoch=2, workers=1)
        frozen = host.shard.state.seen["float32"][SIZE - 7 :]
        assert frozen.tobytes() == loaded["float32"][SIZE - 7 :].tobytes()


@pytest.mark.parametrize("kernel", ["numpy", "fused"])
@pytest.mark.parametrize("lr", [0.01, Polynomial(0.01, 9), lambda step: 0.01])
def test_a_standby_follows_a_change_and_takes_over_with_it(kernel: str, lr: Any) -> None:
    """One of a plain function, which travels as no record, ends it, and it is filled anew."""
    groups = [Group("a", lr_scale=0.5), Group("b", lr_scale=0.5)]  # alike, and so one part
    primary, standby, _ = pair(kernel, groups=groups)
    do_round(primary, 1, 1)
    changed = NadamConfig(lr=lr, beta_1=0.5, groups=[groups[0], Group("b", lr_scale=2.0)])
    primary.send(Pause("me")).result(0)
    primary.send(SetConfig("me", changed, 1)).result(0)
    assert (standby.control_state is None) == (not changed.is_plain)
    primary.send(Resume("me")).result(0)
    if not changed.is_plain:
        primary.send(AttachStandby("there")).result(0)
    for number in (2, 3):
        do_round(primary, number, number)
        assert standby.arrays["params"]["float32"].tobytes() == state_of(primary).params.tobytes()
    before = state_of(primary)
    promoted, now = standby.promote(Reconfigure(epoch=9, schedule=((1, (0, 1)),)), ShardHost)
    assert (promoted.shard.config, now.revision, now.applied_revision) == (changed, 1, 1)
    for host in (primary, promoted):
        host.send(Reconfigure(epoch=10, schedule=((1, (0, 1)),))).result(0)
    assert state_of(promoted).params.tobytes() == before.params.tobytes()
