"""What processes send each other has the layout that the protocol's version names."""

import hashlib
import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import numpy as np

from distnadam import protocol
from distnadam.errors import DistNadamError, StaleEpoch
from distnadam.hyperparameters import NadamConfig
from distnadam.nadam.step_overrides import packed_overrides
from distnadam.nadam.step_scalars import Clock, TensorClock, TensorClocks
from distnadam.protocol import codec
from distnadam.protocol.frames import VERSION
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
from distnadam.protocol.round_settings import RoundSettings
from distnadam.protocol.supervisor_messages import (
    DetachStandby,
    Reconfigure,
    Record,
    ReplicatedConfig,
    ReplicatedJoin,
    ReplicatedRound,
)

LAYOUT = {5: "869229c375090ee5"}
"""What `layout` is in this version. Where the test below fails, raise `VERSION` and replace both:
processes of the version before would take a frame for what it is not.
"""
PLACE: dict[str, Any] = {"epoch": 1, "rank": 2, "incarnation": 3, "round": 4}
GRADIENTS = {"float32": np.ones(3, np.float16), "float64": np.ones(2)}
SETTINGS = RoundSettings(micro_steps=2, absent=frozenset({5}), statement="s")
RATES = RoundSettings(overrides=packed_overrides(0.5, (0.8, 0.9), None))
NOTE = PushNote(incarnation=3, round=4, dtypes={"float32": "float16"})
RESULT: dict[str, Any] = {"epoch": 1, "round": 2, "iterations": 3, "lr": 0.5, "buffer": 1}
ROUND: dict[str, Any] = {"round": 4, "skipped": 1, "counted": {2: NOTE}, "lr": 0.5, "active": 1}
MESSAGES: list[Any] = [
    Push(**PLACE, gradients=GRADIENTS),
    Push(**PLACE, gradients=GRADIENTS, settings=RATES),
    Push(**PLACE, gradients=GRADIENTS, settings=SETTINGS),
    PushSlice(**PLACE, space="float32", begin=5, end=6),
    GroupPush(epoch=1, round=4, members={2: NOTE}, gradients=GRADIENTS),
    RoundResult(**RESULT, outcome="applied", rejection=None),
    RoundResult(**RESULT, outcome="refused", rejection="why"),
    TotalNorms(**PLACE, square_sums=np.ones(2)),
    PartialNorms(4, ((0, np.ones(2)),)),
    Pull(rank=1, incarnation=2, at_least=3, epoch=4),
    Leave(1, 2),
    WorkerDied(1, 2),
    None,
    DistNadamError("text"),
    StaleEpoch("text", 1, 2),
]
RECORDS: list[Record] = [
    ReplicatedJoin(1, 2, "process"),
    Reconfigure(epoch=1, schedule=((0, (1, 2)),), newest={1: 2}),
    ReplicatedConfig(config=NadamConfig(), revision=1),
    DetachStandby(),
    ReplicatedRound(**ROUND, outcome="applied", rejection=None, clock=Clock(7, 0.5)),
    ReplicatedRound(
        **ROUND,
        outcome="refused",
        rejection="why",
        clock=Clock(7, 0.5, TensorClocks.of([TensorClock(3, 0.25)])),
    ),
]


def layout() -> str:
    """Digest the frames of one of each message, and the fields of all records that Ray carries."""
    digest = hashlib.sha256()
    for number, message in enumerate(MESSAGES):
        digest.update(codec.pack(number, message))
    for record in RECORDS:
        digest.update(codec.pack_record(record))
    names = (f"{protocol.__name__}.{each.name}" for each in pkgutil.iter_modules(protocol.__path__))
    records = {
        kind.__name__: [field.name for field in fields(kind)]
        for name in names
        for kind in vars(importlib.import_module(name)).values()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == name
    }
    digest.update(repr(sorted(records.items())).encode())
    return digest.hexdigest()[:16]


def test_a_change_of_what_is_sent_raises_the_version() -> None:
    assert {VERSION: layout()} == LAYOUT


def test_every_message_and_record_is_looked_at() -> None:
    sent = {DistNadamError if isinstance(m, DistNadamError) else type(m) for m in MESSAGES}
    assert sent == set(codec._FIELDS)
    assert {type(record) for record in RECORDS} == set(get_args(Record))
