"""What is known of each step of a run: its loss, its learning rate, and whose loss that is."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankStep:
    """What one rank saw of one step.

    Args:
        loss: the rank's own.
        lr: the learning rate that the step was applied with; None if the rank did not see its end.
    """

    loss: float
    lr: float | None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of a run.

    Args:
        step: counted from 1.
        loss: the mean over `ranks`; NaN if there are none.
        lr: the learning rate that it was applied with; NaN if nobody saw it.
        ranks: the ranks whose loss is known: all, unless the process of one died before it could
            report what it had pushed, or the run goes on without one.
    """

    step: int
    loss: float
    lr: float
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, step: int, seen: Mapping[int, RankStep]) -> "StepRecord":
        """Return the record of a step from what each rank saw of it."""
        ranks = tuple(sorted(seen))
        rates = [each.lr for each in seen.values() if each.lr is not None]
        return cls(
            step=step,
            loss=sum(seen[rank].loss for rank in ranks) / len(ranks) if ranks else math.nan,
            lr=rates[0] if rates else math.nan,
            ranks=ranks,
        )


def in_words(numbers: Iterable[int]) -> str:
    """Return whole numbers in ascending order as runs, such as "0-3 6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
