"""What a shard's state machine asks its host to do, as plain records. Data only.

The host carries effects out in the order in which the machine returned them; only `Compute` runs
beside those that follow.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from distnadam.protocol.supervisor_events import Report
from distnadam.protocol.supervisor_messages import Record


class Work(Enum):
    """What the host computes outside any lock and then reports to `Shard.computed`."""

    __hash__ = object.__hash__  # an enumeration's own is a function of Python's

    MEASURE = "measure"
    STEP = "step"
    LOAD_OR_COPY = "load or copy"


@dataclass(slots=True)  # not frozen, which costs a microsecond a step
class Answer:
    """Answer this caller; an exception is raised where the message came from."""

    caller: Any
    reply: Any


@dataclass(frozen=True)
class Compute:
    """Do this work, then report it. The machine asks for one at a time."""

    work: Work


@dataclass(slots=True)  # not frozen, which costs a microsecond a step
class Replicate:
    """Send a record to the standby, if any, before any effect that follows."""

    record: Record


@dataclass(frozen=True)
class Notice:
    """Report to the supervisor, if any."""

    report: Report


Effect = Answer | Compute | Replicate | Notice
