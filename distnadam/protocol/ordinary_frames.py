"""What every ordinary round sends, as fixed binary frames: a push of gradients and nothing else but
learning rates and betas of its own, the end of its round, and the round's record for a standby.

A body begins with its kind, a number with which no msgpack list begins.
"""

import struct
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

from distnadam.errors import LaneError
from distnadam.nadam.step_scalars import Clock
from distnadam.protocol.frames import HEADER
from distnadam.protocol.messages import Outcome, Push, PushNote, RoundResult
from distnadam.protocol.round_settings import ORDINARY, RoundSettings
from distnadam.protocol.supervisor_messages import ReplicatedRound
from distnadam.tensors.arrays import HALF, NAME_OF, SPACES, Flat

GradientsOf = Callable[[dict[str, str]], Flat]
"""From the dtypes that a worker wrote, by space, to the views of the shard's ranges in its arena.
"""

_PUSH_KIND = 1
_PUSH = struct.Struct("<IBQqiqqIB")
"""The body's length, the kind, the frame's number, epoch, rank, incarnation, round, slices, and the
index in `_PUSHED_DTYPES`.
"""
_PUSH_BODY = struct.Struct("<BQqiqqIB")
_NUMBER, _NUMBER_AT = struct.Struct("<Q"), HEADER.size + 1
"""Of every fixed frame but a record's."""
_OVERRIDING_KIND = 3
"""Of the same record with overrides behind it."""
_PUSHED_DTYPES = tuple(
    dict(zip(spaces, dtypes, strict=True))
    for spaces in (SPACES, SPACES[:1], SPACES[1:])
    for dtypes in product(*(sorted(HALF | {s}) if s == "float32" else (s,) for s in spaces))
)
"""The dtypes in which gradients may lie, by space."""
_PUSHED_INDEX: dict[Any, int] = {
    tuple(dtypes.items()): i for i, dtypes in enumerate(_PUSHED_DTYPES)
}

_DECIDED_KIND = 2
_DECIDED = struct.Struct("<IBQqqqBdBqqdd")
"""The body's length, the kind, the frame's number, epoch, round, iterations, the index in
`_OUTCOMES`, the learning rate, the buffer, the epoch of the last rewind, the revision, the loss
scale, and the norm of the gradient.
"""
_DECIDED_BODY = struct.Struct("<BQqqqBdBqqdd")
_ROUND_KIND = 4
_ROUND = struct.Struct("<IBqqdBqd")
"""The body's length, the kind, the round, rounds skipped, the learning rate, the buffer, iterations
and the product of the momentum coefficients; `_COUNTED` for each rank follows.
"""
_ROUND_BODY = struct.Struct("<BqqdBqd")
_COUNTED = struct.Struct("<iqB")
"""A rank, its incarnation, and the index in `_PUSHED_DTYPES`."""
_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def _pack_push(number: int, push: Push) -> bytes | None:
    """Return the fixed record of a push of gradients; None if it is none, or has settings beside
    overrides.
    """
    if push.rejection is not None or push.gradients is None:
        return None
    settings, kind = push.settings, _PUSH_KIND
    if settings is not ORDINARY:
        if not settings.only_overrides:
            return None
        if settings.overrides:  # not only another object that says the same as `ORDINARY`
            kind = _OVERRIDING_KIND
    names = tuple([(space, NAME_OF.get(a.dtype, "")) for space, a in push.gradients.items()])
    if (dtypes := _PUSHED_INDEX.get(names)) is None:
        return None
    place = push.epoch, push.rank, push.incarnation, push.round
    size = _PUSH.size - HEADER.size + len(settings.overrides)
    record = _PUSH.pack(size, kind, number, *place, push.slices, dtypes)
    return record + settings.overrides if settings.overrides else record


def _unpack_overriding(frame: bytes, gradients_of: GradientsOf | None) -> tuple[int, Push]:
    overrides = frame[_PUSH_BODY.size :]
    number, push = _unpack_push(frame[: _PUSH_BODY.size], gradients_of)
    if not overrides:
        raise ValueError("a push has no overrides where there should be some")
    push.settings = RoundSettings(overrides=overrides)
    return number, push


def _unpack_push(frame: bytes, gradients_of: GradientsOf | None) -> tuple[int, Push]:
    if gradients_of is None:
        raise LaneError("a push came where none is expected")
    _, number, epoch, rank, incarnation, turn, slices, dtypes = _PUSH_BODY.unpack(frame)
    return number, Push(
        epoch=epoch,
        rank=rank,
        incarnation=incarnation,
        round=turn,
        gradients=gradients_of(_PUSHED_DTYPES[dtypes]),
        slices=slices,
    )


def push_bodies(push: Push) -> Callable[[int, int], bytes]:
    """Return what makes the frame's body of pushes like an ordinary one without overrides, from the
    frame's number and the round.
    """
    assert push.gradients is not None
    place, pack = (push.epoch, push.rank, push.incarnation), _PUSH_BODY.pack
    dtypes = _PUSHED_INDEX[tuple(push.note.dtypes.items())]  # type: ignore[union-attr]

    def body(number: int, round: int) -> bytes:
        return pack(_PUSH_KIND, number, *place, round, push.slices, dtypes)

    return body


def renumbered(frame: bytes, number: int) -> bytes:
    """Return a fixed frame with another number."""
    return frame[:_NUMBER_AT] + _NUMBER.pack(number) + frame[_NUMBER_AT + _NUMBER.size :]


def _pack_decided(number: int, result: RoundResult) -> bytes | None:
    """Return the fixed record of a round's end; None if it has a text."""
    if result.rejection is not None:
        return None
    return _DECIDED.pack(
        _DECIDED.size - HEADER.size,
        _DECIDED_KIND,
        number,
        result.epoch,
        result.round,
        result.iterations,
        _OUTCOMES.index(result.outcome),
        result.lr,
        result.buffer,
        result.rewound,
        result.revision,
        result.loss_scale,
        result.gradient_norm,
    )


def _unpack_decided(frame: bytes, _: GradientsOf | None) -> tuple[int, RoundResult]:
    _, number, epoch, turn, iterations, outcome, lr, *last = _DECIDED_BODY.unpack(frame)
    buffer, rewound, revision, loss_scale, gradient_norm = last
    return number, RoundResult(
        epoch=epoch,
        round=turn,
        iterations=iterations,
        outcome=_OUTCOMES[outcome],
        rejection=None,
        lr=lr,
        buffer=buffer,
        rewound=rewound,
        revision=revision,
        loss_scale=loss_scale,
        gradient_norm=gradient_norm,
    )


PACK: dict[type, Callable[[int, Any], bytes | None]] = {
    Push: _pack_push,
    RoundResult: _pack_decided,
}
"""By a message's type, what gives its frame; None if it has no fixed one."""


def pack_round(record: ReplicatedRound) -> bytes | None:
    """Return the fixed record of an applied round of ordinary pushes; None if it is none."""
    if record.outcome != "applied" or record.clock.tensors is not None:
        return None
    counted = b""
    for rank, note in record.counted.items():
        names = None if note.dtypes is None else tuple(note.dtypes.items())
        dtypes = _PUSHED_INDEX.get(names)
        if dtypes is None or note.rejection is not None or note.settings is not ORDINARY:
            return None
        counted += _COUNTED.pack(rank, note.incarnation, dtypes)
    clock = record.clock
    return (
        _ROUND.pack(
            _ROUND.size - HEADER.size + len(counted),
            _ROUND_KIND,
            record.round,
            record.skipped,
            record.lr,
            record.active,
            clock.iterations,
            clock.m_schedule,
        )
        + counted
    )


def unpack_round(frame: bytes) -> ReplicatedRound | None:
    """Return the round of a body that `pack_round` made; None for another."""
    if frame[0] != _ROUND_KIND:
        return None
    fixed = frame[: _ROUND_BODY.size]
    _, number, skipped, lr, active, iterations, m_schedule = _ROUND_BODY.unpack(fixed)
    return ReplicatedRound(
        round=number,
        skipped=skipped,
        outcome="applied",
        rejection=None,
        counted={
            rank: PushNote(incarnation=incarnation, round=number, dtypes=_PUSHED_DTYPES[dtypes])
            for rank, incarnation, dtypes in _COUNTED.iter_unpack(frame[_ROUND_BODY.size :])
        },
        lr=lr,
        active=active,
        clock=Clock(iterations, m_schedule),
    )


UNPACK: dict[int, Callable[[bytes, GradientsOf | None], tuple[int, Any]]] = {
    _PUSH_KIND: _unpack_push,
    _OVERRIDING_KIND: _unpack_overriding,
    _DECIDED_KIND: _unpack_decided,
}
"""By a body's kind, what gives its number and message."""
