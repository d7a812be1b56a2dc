"""The protocol's messages between a worker and a shard as bytes: one frame each. No sockets.

The two messages of every ordinary round have fixed frames (`ordinary_frames`), all others msgpack.

Arrays of gradients and parameters are not in them: those lie in arenas or, between hosts, follow
the frame, and a push says only in which dtypes.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

from distnadam import errors
from distnadam.errors import ConfigError, DistNadamError, LaneError, StaleEpoch
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_scalars import Clock, TensorClocks
from distnadam.protocol.frames import frame_of
from distnadam.protocol.messages import (
    GroupPush,
    Leave,
    PartialNorms,
    Pull,
    Push,
    PushNote,
    PushSlice,
    RoundResult,
    TotalNorms,
    WorkerDied,
)
from distnadam.protocol.ordinary_frames import (
    PACK,
    UNPACK,
    GradientsOf,
    pack_round,
    unpack_round,
)
from distnadam.protocol.round_settings import RoundSettings, packed, unpacked
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Reconfigure,
    Record,
    ReplicatedConfig,
    ReplicatedJoin,
    ReplicatedRound,
)

_SUMS = 1  # the msgpack extension of a float64 array


def pack(number: int, message: Any) -> bytes:
    """Return a frame: the number that pairs question and answer, and the message."""
    pack_ordinary = PACK.get(type(message))
    if pack_ordinary is not None and (frame := pack_ordinary(number, message)) is not None:
        return frame
    kind = DistNadamError if isinstance(message, DistNadamError) else type(message)
    if kind not in _FIELDS:
        raise TypeError(f"{type(message).__name__} does not travel by lane")
    body = _FIELDS[kind](message)
    return frame_of(msgpack.packb((number, *body), default=_pack_array))


def unpack(frame: bytes, gradients_of: GradientsOf | None = None) -> tuple[int, Any]:
    """Return the number and the message of a frame's body; raise LaneError where it is none."""
    try:
        if (unpack_ordinary := UNPACK.get(frame[0])) is not None:
            return unpack_ordinary(frame, gradients_of)
        number, kind, *fields = msgpack.unpackb(frame, ext_hook=_unpack_array)
        return number, _MAKE[kind](gradients_of, *fields)
    except (ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise LaneError(f"a frame of {len(frame)} bytes is no message: {error}") from error


def _push(gradients_of: GradientsOf | None, *fields: Any) -> Push:
    if gradients_of is None:
        raise LaneError("a push came where none is expected")
    epoch, rank, incarnation, number, dtypes, rejection, slices, given = fields
    place = _whole(epoch=epoch, rank=rank, incarnation=incarnation, round=number, slices=slices)
    settings = _check_push(dtypes, rejection, given)
    return Push(
        **place,
        gradients=None if dtypes is None else gradients_of(dtypes),
        rejection=rejection,
        settings=settings,
    )


def _check_push(dtypes: Any, rejection: Any, given: Any) -> RoundSettings:
    """Return the settings of a push; raise TypeError for one of nothing, or of what a shard would
    fail on.
    """
    if not isinstance(rejection, str | None):
        raise TypeError(f"a rejection is {rejection!r:.50}")
    if not isinstance(dtypes, dict | None) or (dtypes is None and rejection is None):
        raise TypeError(f"dtypes are {dtypes!r:.50}")
    settings = unpacked(given)
    if settings.found_inf and rejection is None:
        raise TypeError("a push with found_inf has no rejection")
    return settings


def _slice(_: GradientsOf | None, *fields: Any) -> PushSlice:
    epoch, rank, incarnation, number, space, begin, end = fields
    place = _whole(epoch=epoch, rank=rank, incarnation=incarnation, round=number)
    if not isinstance(space, str):
        raise TypeError(f"a space is {space!r:.50}")
    return PushSlice(**place, space=space, **_whole(begin=begin, end=end))


def _norms(_: GradientsOf | None, *fields: Any) -> TotalNorms:
    epoch, rank, incarnation, number, square_sums = fields
    place = _whole(epoch=epoch, rank=rank, incarnation=incarnation, round=number)
    if not isinstance(square_sums, np.ndarray):
        raise TypeError(f"sums of squares are {square_sums!r:.50}")
    return TotalNorms(**place, square_sums=square_sums)


def _group(
    gradients_of: GradientsOf | None, epoch: int, number: int, notes: Any, spaces: Any
) -> GroupPush:
    if gradients_of is None:
        raise LaneError("a group's push came where none is expected")
    place = _whole(epoch=epoch, round=number)
    members = {}
    for rank, incarnation, dtypes, rejection, given in notes:
        _whole(rank=rank, incarnation=incarnation)
        members[rank] = PushNote(
            incarnation=incarnation,
            round=number,
            dtypes=dtypes,
            rejection=rejection,
            settings=_check_push(dtypes, rejection, given),
        )
    rejected = any(note.rejection is not None for note in members.values())
    if not isinstance(spaces, list) or not members or not (spaces or rejected):
        raise TypeError(f"a group's push of {len(members)} ranks holds {spaces!r:.50}")
    gradients = gradients_of({space: space for space in spaces}) if spaces else None
    return GroupPush(**place, members=members, gradients=gradients)


def _result(_: GradientsOf | None, *fields: Any) -> RoundResult:
    epoch, number, iterations, outcome, rejection, lr, *rest = fields
    buffer, rewound, revision, loss_scale, gradient_norm = rest
    return RoundResult(
        epoch=epoch,
        round=number,
        iterations=iterations,
        outcome=outcome,
        rejection=rejection,
        lr=lr,
        buffer=buffer,
        parameters=None,
        rewound=rewound,
        revision=revision,
        loss_scale=loss_scale,
        gradient_norm=gradient_norm,
    )


def _error(_: GradientsOf | None, name: str, text: str, epoch: int, step: int) -> DistNadamError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, StaleEpoch):
        return kind(text, epoch, step)
    return (
        kind(text)
        if isinstance(kind, type) and issubclass(kind, DistNadamError)
        else DistNadamError(f"{name}: {text}")
    )


_MAKE: dict[str, Callable[..., Any]] = {
    "push": _push,
    "slice": _slice,
    "group": _group,
    "result": _result,
    "norms": _norms,
    "measured": lambda _, number, sums: PartialNorms(
        number, tuple((tensor, array) for tensor, array in sums)
    ),
    "pull": lambda _, rank, incarnation, at_least, epoch: Pull(
        **_whole(rank=rank, incarnation=incarnation, at_least=at_least, epoch=epoch)
    ),
    "leave": lambda _, rank, incarnation: Leave(**_whole(rank=rank, incarnation=incarnation)),
    "died": lambda _, rank, incarnation: WorkerDied(**_whole(rank=rank, incarnation=incarnation)),
    "done": lambda _: None,
    "error": _error,
}


def _whole(**numbers: Any) -> dict[str, Any]:
    """Return whole numbers by name; raise TypeError for others, on which a shard would fail."""
    for name, value in numbers.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r:.50}")
    return numbers


def _packed_notes(notes: Mapping[int, PushNote]) -> list[tuple[Any, ...]]:
    return [
        (rank, note.incarnation, note.dtypes, note.rejection, packed(note.settings))
        for rank, note in notes.items()
    ]


_FIELDS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    Push: lambda push: (
        "push",
        push.epoch,
        push.rank,
        push.incarnation,
        push.round,
        push.note.dtypes,
        push.rejection,
        push.slices,
        packed(push.settings),
    ),
    PushSlice: lambda part: (
        "slice",
        part.epoch,
        part.rank,
        part.incarnation,
        part.round,
        part.space,
        part.begin,
        part.end,
    ),
    GroupPush: lambda group: (
        "group",
        group.epoch,
        group.round,
        _packed_notes(group.members),
        list(group.gradients or ()),
    ),
    RoundResult: lambda result: (
        "result",
        result.epoch,
        result.round,
        result.iterations,
        result.outcome,
        result.rejection,
        result.lr,
        result.buffer,
        result.rewound,
        result.revision,
        result.loss_scale,
        result.gradient_norm,
    ),
    TotalNorms: lambda norms: (
        "norms",
        norms.epoch,
        norms.rank,
        norms.incarnation,
        norms.round,
        norms.square_sums,
    ),
    PartialNorms: lambda norms: ("measured", norms.round, norms.sums),
    Pull: lambda pull: ("pull", pull.rank, pull.incarnation, pull.at_least, pull.epoch),
    Leave: lambda leave: ("leave", leave.rank, leave.incarnation),
    WorkerDied: lambda died: ("died", died.rank, died.incarnation),
    type(None): lambda _: ("done",),
    DistNadamError: lambda error: (
        "error",
        type(error).__name__,
        str(error),
        getattr(error, "epoch", -1),
        getattr(error, "step", -1),
    ),
}
"""The fields of each message, its name in `_MAKE` first."""


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return msgpack.ExtType(_SUMS, value.tobytes())
    raise TypeError(f"{type(value).__name__} does not travel by lane")


def _unpack_array(code: int, data: bytes) -> Any:
    if code != _SUMS:
        raise ValueError(f"unknown extension {code}")
    return np.frombuffer(data, np.float64)


def pack_record(record: Record) -> bytes:
    """Return a frame."""
    body: tuple[Any, ...]
    match record:
        case ReplicatedJoin():
            body = ("join", record.rank, record.incarnation, record.process)
        case Reconfigure():
            body = ("reconfigure", record.epoch, record.schedule, record.newest)
        case ReplicatedConfig():
            body = ("config", record.config.to_dict(), record.revision)
        case DetachStandby():
            body = ("detach",)
        case ReplicatedRound():
            if (frame := pack_round(record)) is not None:
                return frame
            tensors = record.clock.tensors
            own = None if tensors is None else tensors.to_dict()
            clock = (record.clock.iterations, record.clock.m_schedule, own)
            counted = _packed_notes(record.counted)
            outcome = (record.outcome, record.rejection, counted, record.lr, record.active)
            body = ("round", record.round, record.skipped, *outcome, *clock)
    return frame_of(msgpack.packb(body))


def unpack_record(frame: bytes) -> Record:
    """Return the record of a frame's body; raise LaneError where it is none."""
    try:
        if (ordinary := unpack_round(frame)) is not None:
            return ordinary
        kind, *fields = msgpack.unpackb(frame, strict_map_key=False)
        return _MAKE_RECORD[kind](*fields)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ConfigError,
        struct.error,
    ) as error:
        raise LaneError(f"a frame of {len(frame)} bytes is no record: {error}") from error


def _reconfigure(epoch: int, schedule: Any, newest: dict[int, int]) -> Reconfigure:
    return Reconfigure(
        epoch=epoch,
        schedule=tuple((first, tuple(ranks)) for first, ranks in schedule),
        newest=newest,
    )


def _config(config: dict[str, Any], revision: int) -> ReplicatedConfig:
    return ReplicatedConfig(config=NadamConfig.from_dict(config), revision=revision)


def _round(
    number: int, skipped: int, outcome: Any, rejection: Any, notes: Any, lr: Any, *rest: Any
) -> ReplicatedRound:
    active, iterations, m_schedule, own = rest
    counted = {
        rank: PushNote(
            incarnation=incarnation,
            round=number,
            dtypes=dtypes,
            rejection=why,
            settings=unpacked(given),
        )
        for rank, incarnation, dtypes, why, given in notes
    }
    return ReplicatedRound(
        round=number,
        skipped=skipped,
        outcome=outcome,
        rejection=rejection,
        counted=counted,
        lr=lr,
        active=active,
        clock=Clock(iterations, m_schedule, own and TensorClocks.from_dict(own)),
    )


_MAKE_RECORD: dict[str, Callable[..., Record]] = {
    "join": ReplicatedJoin,
    "reconfigure": _reconfigure,
    "config": _config,
    "detach": DetachStandby,
    "round": _round,
}
"""What makes a record of the fields behind its name."""
