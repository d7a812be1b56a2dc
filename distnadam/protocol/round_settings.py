"""What a rank says of a round beside its gradients. Plain data.

One record goes with a push wherever it goes: in its note, so that a dead worker's push is completed
with it, in its group's, and in what a standby follows. `shard/verdict.py` compares those of all
ranks once they are in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from distnadam.nadam.step_overrides import check_overrides


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """One rank's settings of one round.

    Attributes:
        found_inf: whether the rank's loss-scaled gradients overflowed: a vote to skip the round. A
            push with it has a rejection, and no gradients.
        micro_steps: of how many micro-batches the gradients are the mean.
        overrides: the learning rates and betas of this step alone (`nadam.step_overrides`).
        absent: the indices of the tensors that the rank has no gradient of; what it pushes of them
            is +0.0.
        statement: what the rank says in a round that is for this alone, with a rejection and no
            gradients; all ranks must say the same, and no step follows (`client/agreement.py`).
    """

    found_inf: bool = False
    micro_steps: int = 1
    overrides: bytes = b""
    absent: frozenset[int] = frozenset()
    statement: str = ""

    def __post_init__(self) -> None:
        if type(self.found_inf) is not bool:
            raise TypeError(f"found_inf is {self.found_inf!r:.50}")
        if type(self.micro_steps) is not int or self.micro_steps < 1:
            raise TypeError(f"micro_steps is {self.micro_steps!r:.50}")
        if type(self.statement) is not str:
            raise TypeError(f"statement is {self.statement!r:.50}")
        if self.overrides != b"":
            check_overrides(self.overrides)
        if self.absent and (set(map(type, self.absent)) != {int} or min(self.absent) < 0):
            raise TypeError(f"absent is {self.absent!r:.50}")

    @property
    def only_overrides(self) -> bool:
        """Whether there are overrides, and all else is as of an ordinary push."""
        return self.overrides != b"" and not (
            self.found_inf or self.micro_steps != 1 or self.absent or self.statement
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return unpacked, (packed(self),)  # so that ordinary ones stay that very object


ORDINARY = RoundSettings()
"""Those of nearly every push, always by this very object where a push comes from this package."""

_NAMES = tuple(field.name for field in fields(RoundSettings))


def packed(settings: RoundSettings) -> list[Any] | None:
    """Return settings as plain data for a frame; None if they are ordinary."""
    if settings == ORDINARY:
        return None
    values = [getattr(settings, name) for name in _NAMES]
    return [sorted(value) if isinstance(value, frozenset) else value for value in values]


def unpacked(values: Any) -> RoundSettings:
    """Return the settings that `packed` described; raise TypeError for what are none."""
    if values is None:
        return ORDINARY
    if not isinstance(values, list) or len(values) != len(_NAMES):
        raise TypeError(f"settings are {values!r:.50}")
    given = dict(zip(_NAMES, values, strict=True))
    return RoundSettings(**{**given, "absent": frozenset(given["absent"])})


def absent_in(settings: Iterable[RoundSettings]) -> frozenset[int]:
    """Return the tensors that no rank of a round has a gradient of."""
    absent = [each.absent for each in settings]
    return frozenset.intersection(*absent) if absent else frozenset()
