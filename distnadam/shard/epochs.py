"""The epoch of a shard, which rises whenever what workers know may be out of date; it decides which
error a message of an older epoch gets. Pure.
"""

from distnadam.errors import Reconfigured, Rewound, StaleEpoch
from distnadam.protocol.supervisor_messages import Reason


class Epochs:
    """The current epoch, and why each began.

    Attributes:
        now: the current epoch.
        rewound: the epoch in which all shards last went back, or began; 0 before.
    """

    def __init__(self) -> None:
        self.now = 0
        self.rewound = 0
        self._history: list[tuple[int, Reason]] = []

    @property
    def reason(self) -> str:
        """Why the current epoch began; "" for the first."""
        return self._history[-1][1] if self._history else ""

    @property
    def history(self) -> tuple[tuple[int, Reason], ...]:
        """Every epoch so far, and why it began."""
        return tuple(self._history)

    def restore(self, history: tuple[tuple[int, Reason], ...]) -> None:
        """Take over the history of another shard."""
        self._history = list(history)
        self.now = max([self.now, *(number for number, _ in history)])
        self.rewound = max((n for n, reason in history if reason == "rewound"), default=0)

    def advance(self, reason: Reason, to: int | None = None) -> None:
        """Begin the next epoch, or the one given if it is later than the current."""
        self.now = self.now + 1 if to is None else max(to, self.now)
        self._history.append((self.now, reason))
        if reason == "rewound":
            self.rewound = self.now

    def refusal(self, epoch: int, who: str, decided: int) -> StaleEpoch | None:
        """Return the error for a message of `epoch`, or None if current; the most severe wins."""
        if epoch == self.now:
            return None
        since = {reason for number, reason in self._history if number > epoch}
        found = f"{who}: message of epoch {epoch}, expected {self.now}"
        if "rewound" in since:
            why = (
                f"{found}: all shards went back after a death, to round {decided}; compute "
                "again from there"
            )
            return Rewound(why, self.now, decided)
        if "replaced" in since or epoch > self.now:
            return StaleEpoch(
                f"{found}: the state was replaced; pull and compute again", self.now, decided
            )
        return Reconfigured(
            f"{found}: a shard or the membership changed; push again", self.now, decided
        )
