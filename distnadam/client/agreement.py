"""Rounds in which the ranks say something to each other, and push nothing: all must say the same.

What ranks change outside of a step they agree on so, before one of them changes the shards.
"""

from distnadam.client.in_flight_push import InFlightPush
from distnadam.client.worker_session import WorkerSession
from distnadam.errors import DistNadamError
from distnadam.protocol.round_settings import RoundSettings
from distnadam.shield import shield


class Agreement:
    """What one rank has agreed on with the others, until it is carried out: a rank that a Ctrl-C
    has stopped between the two goes on from there, since the others ask no second time.
    """

    def __init__(self) -> None:
        self._push: InFlightPush | None = None

    def reach(self, session: WorkerSession, what: str) -> int:
        """Wait until all ranks have said the same, in a round of its own, after which no step
        follows, unless they have said it in the last one; return the epoch of that.

        Args:
            session: this rank's.
            what: not empty.

        Raises:
            RanksDisagree: naming what each rank said; one that pushed gradients said nothing.
            StaleEpoch, Rewound, StepTimeout, WorkerLost, Unrecoverable: as `Ticket.result`.
        """
        if session.in_flight is not None:
            session.wait_for(session.in_flight)
        push = self._push
        if push is None or not _is_agreed(push, session, what):
            session.sync()
            with shield:
                push = self._push = session.push(
                    lambda ranges: [{} for _ in ranges],
                    f"worker {session.rank} says: {what}",
                    want_parameters=False,
                    settings=RoundSettings(statement=what),
                )
        return session.wait_for(push).epoch

    def carried_out(self) -> None:
        """Ask again, whatever is said next."""
        self._push = None


def _is_agreed(push: InFlightPush, session: WorkerSession, what: str) -> bool:
    """Whether all ranks have said this in the round at which the session stands."""
    ended = push.ended
    if ended is None or isinstance(ended, DistNadamError) or push.settings.statement != what:
        return False
    is_same = ended.epoch == session.epoch or session.rank > 0  # where rank 0 has carried it out
    return is_same and ended.round == session.round
