"""A shard's phases, which message is legal in which, and the effects it asks of its host. Data only; the machine is in `shard`."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import distnadam.messages as msg


class Phase(Enum):
    """Where a shard is in its round."""

    COLLECTING = "collecting pushes"
    MEASURING = "measuring norms"
    AWAITING_NORMS = "awaiting norms"
    STEPPING = "stepping"
    BROKEN = "broken"


class Work(Enum):
    """What the host is to compute, outside any lock, and report to `Shard.computed`."""

    MEASURE = "measure"
    STEP = "step"


@dataclass(frozen=True)
class Answer:
    """An effect: answer this caller."""

    caller: Any
    reply: Any


@dataclass(frozen=True)
class Compute:
    """An effect: do this work, then report it."""

    work: Work


Effect = Answer | Compute

_ALWAYS = frozenset({msg.Join, msg.Push, msg.Norms, msg.Pull, msg.Leave, msg.Lost, msg.Hold, msg.Advance, msg.Release, msg.Describe})
_AT_REST = _ALWAYS | {msg.Read, msg.Write, msg.SetRate, msg.Step, msg.StepNorms, msg.Save, msg.Restore}
LEGAL: dict[Phase, frozenset[type]] = {
    Phase.COLLECTING: _AT_REST,
    Phase.MEASURING: _ALWAYS,
    Phase.AWAITING_NORMS: _AT_REST,
    Phase.STEPPING: _ALWAYS,
    Phase.BROKEN: frozenset({msg.Describe, msg.Release, msg.Lost}),
}
