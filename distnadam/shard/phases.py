"""A shard's phases: which message is legal in each, and which phase may follow it. Data only."""

from enum import Enum

import distnadam.protocol.messages as msg
import distnadam.protocol.supervisor_messages as orders


class Phase(Enum):
    """What a shard is doing."""

    __hash__ = object.__hash__  # an enumeration's own is a function of Python's

    COLLECTING = "collecting pushes"
    MEASURING = "measuring norms"
    AWAITING_NORMS = "awaiting norms"
    STEPPING = "stepping"
    LOADING = "loading or copying its state"
    EMPTY = "without a state, since loading failed"
    BROKEN = "broken"


AT_REST = frozenset({Phase.COLLECTING, Phase.AWAITING_NORMS})
"""Nothing is being computed, and the arrays are those of the last decided round."""

NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.COLLECTING: frozenset(
        {Phase.COLLECTING, Phase.MEASURING, Phase.STEPPING, Phase.LOADING, Phase.BROKEN}
    ),
    Phase.MEASURING: frozenset({Phase.AWAITING_NORMS, Phase.BROKEN}),
    Phase.AWAITING_NORMS: frozenset(
        {Phase.COLLECTING, Phase.STEPPING, Phase.LOADING, Phase.BROKEN}
    ),
    Phase.STEPPING: frozenset({Phase.COLLECTING, Phase.BROKEN}),
    Phase.LOADING: frozenset({Phase.COLLECTING, Phase.EMPTY, Phase.BROKEN}),
    Phase.EMPTY: frozenset({Phase.LOADING}),
    Phase.BROKEN: frozenset(),
}
"""The phases that may follow each phase; COLLECTING follows itself when a round begins again."""

_ALWAYS = frozenset(
    {
        msg.Join,
        msg.Push,
        msg.GroupPush,
        msg.TotalNorms,
        msg.Pull,
        msg.Leave,
        msg.WorkerDied,
        msg.CompletePush,
        msg.Pause,
        msg.CatchUp,
        msg.Resume,
        orders.Reconfigure,
        orders.Load,
        orders.AttachStandby,
        orders.AbandonRank,
        orders.Retire,
    }
)
_AT_REST = _ALWAYS | {msg.Read, msg.Write, msg.SetConfig, msg.Step, msg.StepNorms}
LEGAL: dict[Phase, frozenset[type]] = {
    Phase.COLLECTING: _AT_REST,
    Phase.MEASURING: _ALWAYS,
    Phase.AWAITING_NORMS: _AT_REST,
    Phase.STEPPING: _ALWAYS,
    Phase.LOADING: _ALWAYS,
    Phase.EMPTY: frozenset(
        {
            msg.Resume,
            msg.WorkerDied,
            msg.Leave,
            orders.Load,
            orders.Reconfigure,
            orders.AbandonRank,
        }
    ),
    Phase.BROKEN: frozenset({msg.Resume, msg.WorkerDied}),
}
"""The messages that each phase takes; any other is refused and changes nothing."""
