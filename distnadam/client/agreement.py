"""Rounds in which the ranks say something to each other, and push nothing: all must say the same.

What ranks change outside of a step they agree on so, before one of them changes the shards.
"""

from distnadam.client.worker_session import WorkerSession
from distnadam.protocol.round_settings import RoundSettings


def agree_on(session: WorkerSession, what: str) -> None:
    """Wait until all ranks have said the same, in a round of its own, after which no step follows.

    Args:
        session: this rank's.
        what: not empty.

    Raises:
        RanksDisagree: naming what each rank said; one that pushed gradients said nothing.
        StaleEpoch, Rewound, StepTimeout, WorkerLost, Unrecoverable: as `Ticket.result`.
    """
    if session.in_flight is not None:
        session.wait_for(session.in_flight)
    push = session.push(
        lambda ranges: [{} for _ in ranges],
        f"worker {session.rank} says: {what}",
        want_parameters=False,
        settings=RoundSettings(statement=what),
    )
    session.wait_for(push)
