"""`Ticket`: a push on its way, as its caller has it."""

from distnadam.client.in_flight_push import InFlightPush
from distnadam.client.worker_session import WorkerSession
from distnadam.errors import ConfigError
from distnadam.protocol.messages import RoundResult


class Ticket:
    """A push on its way; `result` waits until its round is decided."""

    def __init__(self, session: WorkerSession, push: InFlightPush) -> None:
        self._session = session
        self._push = push

    def __repr__(self) -> str:
        state = "decided" if self._push.ended is not None else "under way"
        return f"<Ticket: push of rank {self._session.rank} for round {self._push.round}, {state}>"

    @property
    def found_inf(self) -> bool:
        """Whether its round was skipped since a rank voted so; False until `result` knows.

        Of a push whose end this worker sees only after later rounds, as behind a Ctrl-C and direct
        steps, it tells this rank's own vote alone.
        """
        push, ended = self._push, self._push.ended
        if not isinstance(ended, RoundResult):
            return False
        return push.settings.found_inf or (ended.outcome == "voted" and ended.round == push.round)

    def result(self, timeout_s: float | None = None) -> int:
        """Return the number of steps applied once the round is decided.

        A round that was skipped has applied none; `found_inf` says whether a rank's vote was why.

        Args:
            timeout_s: seconds to wait; None means `Options.step_timeout_s`.

        Raises:
            NonFiniteGradient: a worker's gradient was not finite and the round was refused; no
                shard has moved.
            RanksDisagree: the ranks pushed means of different numbers of micro-batches, and the
                round was refused; no shard has moved.
            StaleEpoch: the state was replaced meanwhile; pull and compute again.
            Rewound: (a StaleEpoch) a shard died and all went back to round `error.step`; pull and
                compute again from there.
            StepTimeout: the other workers did not push, or a shard did not answer, in time; the
                message names them. May be called again.
            WorkerLost: another rank's worker died before it pushed, and nobody took it over; this
                push counts nowhere, and another gradient may be pushed for the round.
            Unrecoverable: a shard died, and the settings allow no recovery.
        """
        if timeout_s is not None and not 0.0 <= timeout_s < float("inf"):
            raise ConfigError(f"timeout_s must be a finite number of at least 0, got {timeout_s!r}")
        return self._session.wait_for(self._push, timeout_s).iterations
