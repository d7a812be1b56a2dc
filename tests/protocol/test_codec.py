"""Frames: every message that travels by lane comes back as it was, however the bytes are cut;
nonsense is refused.
"""

import pickle
from dataclasses import replace
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnadam import errors
from distnadam.errors import DistNadamError, LaneError, LatePush
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.protocol.codec import pack, pack_record, unpack, unpack_record
from distnadam.protocol.frames import Frames
from distnadam.protocol.messages import (
    CompletePush,
    Describe,
    GroupPush,
    Leave,
    Outcome,
    PartialNorms,
    Pull,
    Push,
    PushNote,
    RoundResult,
    TotalNorms,
    WorkerDied,
)
from distnadam.protocol.ordinary_frames import PACK
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.supervisor_messages import ReplicatedRound
from distnadam.tensors.arrays import dtype_of

GRADIENTS = {"float32": np.ones(3, np.float16), "float64": np.ones(2)}
RATES = st.dictionaries(st.sampled_from([None, "a", "b"]), st.floats(0.0, 9.0), min_size=1)
BETA = st.floats(0.0, 1.0, exclude_max=True)
OVERRIDES = st.builds(
    packed_overrides,
    st.none() | st.floats(0.0, 9.0) | RATES,
    st.none() | st.tuples(BETA, BETA),
    st.just(["a", "b"]),
)
SETTINGS = st.builds(
    RoundSettings,
    found_inf=st.booleans(),
    micro_steps=st.just(1) | st.integers(1, 1 << 40),
    overrides=OVERRIDES,
    absent=st.frozensets(st.integers(0, 1 << 40)),
)
MESSAGES: list[Any] = [
    Push(
        epoch=1,
        rank=2,
        incarnation=3,
        round=4,
        gradients=None,
        rejection="worker 2: gradient 'w' is not finite",
    ),
    RoundResult(
        epoch=1, round=2, iterations=3, outcome="applied", rejection=None, lr=0.002, buffer=1
    ),
    RoundResult(
        epoch=1, round=2, iterations=3, outcome="refused", rejection="it is NaN", lr=0.0, buffer=0
    ),
    Pull(rank=1, incarnation=2, at_least=3, epoch=4),
    Leave(1, 2),
    WorkerDied(1, 2),
    None,
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back(message: Any) -> None:
    assert unpack(pack(7, message)[4:], lambda dtypes: {}) == (7, message)


def test_a_push_says_in_which_dtypes_the_gradients_lie() -> None:
    asked: list[dict[str, str]] = []

    def gradients_of(dtypes: dict[str, str]) -> Any:
        asked.append(dtypes)
        return GRADIENTS

    _, push = unpack(
        pack(1, Push(epoch=1, rank=2, incarnation=3, round=4, gradients=GRADIENTS))[4:],
        gradients_of,
    )
    assert asked == [{"float32": "float16", "float64": "float64"}]
    assert push.gradients is GRADIENTS


def test_a_groups_push_says_whose_it_is_and_its_sum_is_never_narrower_than_the_space() -> None:
    asked: list[dict[str, str]] = []

    def gradients_of(dtypes: dict[str, str]) -> Any:
        asked.append(dtypes)
        return GRADIENTS

    members = {
        rank: PushNote(
            incarnation=rank,
            round=4,
            dtypes={"float32": "bfloat16"},
            rejection=why,
            settings=settings,
        )
        for rank, why, settings in (
            (2, None, ORDINARY),
            (3, "it is NaN", RoundSettings(micro_steps=3)),
            (4, "it overflowed", RoundSettings(found_inf=True)),
            (5, "it says", RoundSettings(statement="'w' (12ab)")),
            (6, None, RoundSettings(absent=frozenset({300, 2}))),
        )
    }
    for gradients in (GRADIENTS, None):
        group = GroupPush(epoch=1, round=4, members=members, gradients=gradients)
        _, got = unpack(pack(1, group)[4:], gradients_of)
        assert (got.epoch, got.round, got.members) == (1, 4, members)
        assert got.gradients is gradients
    assert asked == [{"float32": "float32", "float64": "float64"}]
    with pytest.raises(LaneError, match="a group's push came where none is expected"):
        unpack(pack(1, group)[4:])


@given(settings=SETTINGS, rank=st.integers(0, 9), has_gradients=st.booleans())
def test_a_push_comes_back_with_its_settings_wherever_it_goes(
    settings: RoundSettings, rank: int, has_gradients: bool
) -> None:
    is_whole = has_gradients and not settings.found_inf
    push = Push(
        epoch=1,
        rank=rank,
        incarnation=3,
        round=4,
        gradients=GRADIENTS if is_whole else None,
        rejection=None if is_whole else "why",
        settings=settings,
    )
    assert unpack(pack(7, push)[4:], lambda dtypes: GRADIENTS) == (7, push)
    assert push.note.settings == settings
    members = {rank: push.note}
    group = GroupPush(epoch=1, round=4, members=members, gradients=push.gradients)
    assert unpack(pack(7, group)[4:], lambda dtypes: GRADIENTS)[1].members == members
    record = ReplicatedRound(
        round=4,
        skipped=1,
        outcome="voted" if settings.found_inf else "disagreed",
        rejection="why",
        counted=members,
        lr=0.5,
        active=1,
        clock=Clock(7, 0.5, TensorClocks.of([TensorClock(3, 0.25), TensorClock()])),
    )
    assert unpack_record(pack_record(record)[4:]) == record
    completed = CompletePush(rank, push.note)
    assert pickle.loads(pickle.dumps(completed)) == completed
    ordinary = pickle.loads(pickle.dumps(settings)) is ORDINARY
    assert ordinary == (settings == ORDINARY)


def test_only_a_push_of_gradients_and_overrides_has_a_fixed_frame() -> None:
    push = Push(**PLACE, gradients={"float32": np.zeros(3, np.float32)})
    assert PACK[Push](3, push) is not None
    rate = RoundSettings(overrides=packed_overrides(0.5, (0.8, 0.9), None))
    frame = PACK[Push](3, replace(push, settings=rate))
    assert frame is not None
    for wrong in (frame[4:-1], frame[4:-24], frame[4:-8] + np.float64(1.0).tobytes()):
        with pytest.raises(LaneError, match="is no message"):
            unpack(wrong, lambda dtypes: GRADIENTS)
    lacks = RoundSettings(absent=frozenset({0}))
    for settings in (RoundSettings(found_inf=True), RoundSettings(micro_steps=2), lacks):
        assert PACK[Push](3, replace(push, settings=settings)) is None


AS_ORDINARY = [False, 1, b"", [], ""]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *((0, value) for value in (0, None)),
        *((1, value) for value in (True, 0, 1.5)),
        *((2, value) for value in (1, "x" * 24, b"x", b"\xff" * 23)),
        (2, np.array([-1.0, 0.5, 0.5]).tobytes()),
        (2, np.array([np.inf, 0.5, 0.5]).tobytes()),
        (2, np.array([0.1, 0.5, 1.0]).tobytes()),
        *((3, value) for value in (1, None, [-1], [True], [0.5], ["a"], [[1]])),
        *((4, value) for value in (1, b"")),
    ],
)
def test_settings_that_are_none_are_refused(index: int, value: Any) -> None:
    *fields, given = msgpack.unpackb(pack(7, TO_A_SHARD[0])[4:])
    assert given is None
    ordinary = msgpack.packb([*fields, AS_ORDINARY])
    assert unpack(ordinary, lambda dtypes: GRADIENTS)[1].settings == ORDINARY
    wrong = [*AS_ORDINARY[:index], value, *AS_ORDINARY[index + 1 :]]
    for each in (wrong, AS_ORDINARY[:-1], [], {"a": 1}):
        with pytest.raises(LaneError, match="is no message"):
            unpack(msgpack.packb([*fields, each]), lambda dtypes: GRADIENTS)


def test_sums_and_norms_come_back_to_the_bit() -> None:
    sums = (np.array([1.5, np.inf, 1e-320]), np.array([]))
    _, measured = unpack(pack(1, PartialNorms(3, ((0, sums[0]), (2, sums[1]))))[4:])
    assert [(tensor, array.tobytes()) for tensor, array in measured.sums] == [
        (0, sums[0].tobytes()),
        (2, b""),
    ]
    _, norms = unpack(
        pack(1, TotalNorms(epoch=1, rank=2, incarnation=3, round=4, square_sums=sums[0]))[4:]
    )
    assert (norms.round, norms.square_sums.tobytes()) == (4, sums[0].tobytes())


@pytest.mark.parametrize(
    "kind",
    [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, DistNadamError)],
)
def test_every_error_comes_back_as_its_own_class(kind: type[DistNadamError]) -> None:
    _, error = unpack(pack(1, kind("the sentence"))[4:])
    assert type(error) is kind
    assert str(error) == "the sentence"


@given(cuts=st.lists(st.integers(1, 60), max_size=20), seed=st.integers(0, 99))
def test_frames_are_whole_however_the_bytes_are_cut(cuts: list[int], seed: int) -> None:
    frames = [pack(number, LatePush("x" * ((seed * number) % 90))) for number in range(5)]
    data, got, cutter = b"".join(frames), [], Frames()
    for size in [*cuts, len(data)]:
        got += cutter.feed(data[:size])
        data = data[size:]
    assert got == [frame[4:] for frame in frames]


@given(st.binary(max_size=60).filter(lambda body: body[:1] not in (b"\1", b"\2", b"\3")))
def test_a_frame_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(LaneError, match="is no message"):
        unpack(body)


@given(
    kind=st.sampled_from([1, 2, 3]),
    tail=st.binary(max_size=80),
    gradients_of=st.sampled_from([None, lambda dtypes: GRADIENTS]),
)
def test_bytes_behind_the_number_of_a_fixed_frame_are_a_message_or_refused(
    kind: int, tail: bytes, gradients_of: Any
) -> None:
    try:
        _, message = unpack(bytes([kind]) + tail, gradients_of)
    except LaneError:
        return
    assert isinstance(message, RoundResult if kind == 2 else Push)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"float32": "float32"},
        {"float32": "bfloat16"},
        {"float64": "float64"},
        {"float32": "float16", "float64": "float64"},
        {"float64": "float64", "float32": "float32"},
    ],
)
def test_an_ordinary_push_and_its_rounds_end_come_back(
    dtypes: dict[str, str],
) -> None:
    asked: list[dict[str, str]] = []

    def gradients_of(found: dict[str, str]) -> Any:
        asked.append(found)
        return GRADIENTS

    flat = {space: np.zeros(3, dtype_of(name)) for space, name in dtypes.items()}
    push = Push(epoch=3, rank=2, incarnation=1 << 40, round=1 << 50, gradients=flat, slices=7)
    number, got = unpack(pack(1 << 40, push)[4:], gradients_of)
    assert number == 1 << 40
    assert got == replace(push, gradients=GRADIENTS)
    assert asked == [dtypes] and list(asked[0]) == list(dtypes)
    for outcome in get_args(Outcome):
        result = RoundResult(
            epoch=1 << 40,
            round=7,
            iterations=5,
            outcome=outcome,
            rejection=None if outcome == "applied" else "why",
            lr=0.1 + 0.2,
            buffer=1,
            rewound=2,
            loss_scale=1024.0,
            gradient_norm=0.1 + 0.2,
        )
        assert unpack(pack(3, result)[4:]) == (3, result)


def test_fixed_frames_cut_short_or_with_an_unknown_index_are_refused() -> None:
    result = RoundResult(
        epoch=1, round=7, iterations=5, outcome="applied", rejection=None, lr=0.5, buffer=1
    )
    push = Push(**PLACE, gradients={"float32": np.zeros(3, np.float32)})
    for message in (result, push):
        body = pack(3, message)[4:]
        for wrong in (body[:-1], body + b"\0"):
            with pytest.raises(LaneError, match=f"a frame of {len(wrong)} bytes is no message"):
                unpack(wrong, lambda dtypes: GRADIENTS)
    with pytest.raises(LaneError, match="is no message"):
        unpack(pack(3, push)[4:-1] + b"\xff", lambda dtypes: GRADIENTS)
    with pytest.raises(LaneError, match="a push came where none is expected"):
        unpack(pack(3, push)[4:])


PLACE = {"epoch": 1, "rank": 0, "incarnation": 1, "round": 2}
TO_A_SHARD = (
    Push(**PLACE, gradients=None, rejection="no"),
    TotalNorms(**PLACE, square_sums=np.ones(2)),
    Pull(rank=0, incarnation=1, at_least=3, epoch=1),
    Leave(0, 1),
    WorkerDied(0, 1),
    GroupPush(
        epoch=1,
        round=2,
        members={0: PushNote(incarnation=1, round=2, dtypes={"float32": "float16"})},
        gradients={"float32": np.ones(2, np.float32)},
    ),
)


@pytest.mark.parametrize("message", TO_A_SHARD, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("value", [b"1", 1.5, [1], {"a": 1}], ids=repr)
def test_a_message_to_a_shard_with_a_field_of_another_type_is_refused(
    message: Any, value: Any
) -> None:
    fields = msgpack.unpackb(pack(7, message)[4:], ext_hook=msgpack.ExtType)
    for index in range(1, len(fields)):
        body = msgpack.packb([*fields[:index], value, *fields[index + 1 :]])
        with pytest.raises(LaneError, match="is no message"):
            unpack(body, lambda dtypes: {space: np.ones(2, dtypes[space]) for space in dtypes})


@pytest.mark.parametrize("value", [b"1", 1.5, [1]], ids=repr)
@pytest.mark.parametrize("index", range(5))
def test_a_groups_push_with_a_field_of_a_rank_of_another_type_is_refused(
    index: int, value: Any
) -> None:
    number, kind, epoch, round, [note], spaces = msgpack.unpackb(pack(7, TO_A_SHARD[-1])[4:])
    notes = [[*note[:index], value, *note[index + 1 :]]]
    body = msgpack.packb([number, kind, epoch, round, notes, spaces])
    with pytest.raises(LaneError, match="is no message"):
        unpack(body, lambda dtypes: GRADIENTS)


@pytest.mark.parametrize(("notes", "spaces"), [([], ["float32"]), ([[0, 1, {}, None, None]], [])])
def test_a_groups_push_of_nobody_or_of_nothing_is_refused(notes: Any, spaces: Any) -> None:
    with pytest.raises(LaneError, match="is no message"):
        unpack(msgpack.packb([7, "group", 1, 2, notes, spaces]), lambda dtypes: GRADIENTS)


def test_a_push_has_gradients_or_says_why_not() -> None:
    """A kernel that got none would read beyond its arrays."""
    for settings in (ORDINARY, RoundSettings(found_inf=True)):
        push = pack(7, Push(**PLACE, gradients=None, rejection=None, settings=settings))[4:]
        with pytest.raises(LaneError, match="is no message"):
            unpack(push, lambda dtypes: {})


def test_a_length_that_cannot_be_and_a_message_that_does_not_travel_are_refused() -> None:
    with pytest.raises(LaneError, match="frame of 4294967295 bytes was announced"):
        Frames().feed(b"\xff\xff\xff\xffx")
    with pytest.raises(TypeError, match="Describe does not travel by lane"):
        pack(1, Describe())
