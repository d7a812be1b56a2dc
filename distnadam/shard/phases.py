"""A shard's phases, which message is legal in which, and the effects it asks of its host. Data
only; the machine is in `shard`.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import distnadam.protocol.messages as msg
from distnadam.protocol import supervisor_events, supervisor_messages


class Phase(Enum):
    """Where a shard is in its round."""

    COLLECTING = "collecting pushes"
    MEASURING = "measuring norms"
    AWAITING_NORMS = "awaiting norms"
    STEPPING = "stepping"
    LOADING = "loading or copying its state"
    EMPTY = "without a state, since loading failed"
    BROKEN = "broken"


class Work(Enum):
    """What the host is to compute, outside any lock, and report to `Shard.computed`."""

    MEASURE = "measure"
    STEP = "step"
    LOAD_OR_COPY = "obey"


@dataclass(frozen=True)
class Answer:
    """An effect: answer this caller."""

    caller: Any
    reply: Any


@dataclass(frozen=True)
class Compute:
    """An effect: do this work, then report it."""

    work: Work


@dataclass(frozen=True)
class Replicate:
    """An effect: tell the standby, if there is one, before anything that follows."""

    record: supervisor_messages.Record


@dataclass(frozen=True)
class Notice:
    """An effect: report to the supervisor, if any."""

    report: supervisor_events.Report


Effect = Answer | Compute | Replicate | Notice

_ALWAYS = frozenset(
    {
        msg.Join,
        msg.Push,
        msg.TotalNorms,
        msg.Pull,
        msg.Leave,
        msg.WorkerDied,
        msg.CompletePush,
        msg.Pause,
        msg.CatchUp,
        msg.Resume,
        msg.Describe,
        supervisor_messages.Reconfigure,
        supervisor_messages.Load,
        supervisor_messages.AttachStandby,
        supervisor_messages.AbandonRank,
        supervisor_messages.Retire,
    }
)
_AT_REST = _ALWAYS | {msg.Read, msg.Write, msg.SetRate, msg.Step, msg.StepNorms}
LEGAL: dict[Phase, frozenset[type]] = {
    Phase.COLLECTING: _AT_REST,
    Phase.MEASURING: _ALWAYS,
    Phase.AWAITING_NORMS: _AT_REST,
    Phase.STEPPING: _ALWAYS,
    Phase.LOADING: _ALWAYS,
    Phase.EMPTY: frozenset(
        {
            msg.Describe,
            msg.Resume,
            msg.WorkerDied,
            msg.Leave,
            supervisor_messages.Load,
            supervisor_messages.Reconfigure,
            supervisor_messages.AbandonRank,
        }
    ),
    Phase.BROKEN: frozenset({msg.Describe, msg.Resume, msg.WorkerDied}),
}
