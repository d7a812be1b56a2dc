"""Whether all shards went back since their user last looked. Pure."""

from distnadam.errors import Rewound


class RewindGuard:
    """Raises `Rewound` once to its user for each time that all shards went back.

    Otherwise an earlier step would pass for a later one.

    Args:
        who: begins the error's sentence, such as "worker 1: ".
        known: the epoch of the last rewind that the user knows of; None before the first look.
    """

    def __init__(self, who: str = "", known: int | None = None) -> None:
        self.known = known
        self._who = who

    def acknowledge(self, epoch: int) -> None:
        """Record that the user got an error that says so of this epoch, or needs none."""
        self.known = max(self.known or 0, epoch)

    def check(self, rewound: int, *, epoch: int, round: int) -> None:
        """Raise Rewound if the shards last went back in an epoch that the user does not know of.

        Args:
            rewound: the epoch in which they last went back.
            epoch: where they stand now.
            round: where they stand now.
        """
        known = self.known
        self.known = rewound
        if known is not None and rewound > known:
            raise Rewound(
                f"{self._who}all shards went back after a death, to round {round}: compute again "
                "what came after it",
                epoch,
                round,
            )
