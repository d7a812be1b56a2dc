"""What is known of each step of a run: its loss, its learning rate, whose loss that is, and where
its time went.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_new = tuple.__new__
"""Makes a named tuple without a call in Python, which takes as long as all else of a record."""


class RankStep(NamedTuple):
    """What one rank saw of one step.

    Attributes:
        loss: the rank's own.
        lr: the learning rate that the step was applied with; None if the rank did not see its end.
        compute_s: seconds of its batch, loss and gradients.
        push_s: seconds in which the gradients were written where the shards read them.
        flight_s: seconds from there until the new parameters could be read.
        samples: in its batch, as far as that shows it; 0 if not known.
        gradient_norm: the norm of the mean gradient; None if clipping did not need it.
    """

    loss: float
    lr: float | None
    compute_s: float = math.nan
    push_s: float = math.nan
    flight_s: float = math.nan
    samples: int = 0
    gradient_norm: float | None = None


class Phases(NamedTuple):
    """Where the time of a step went, in seconds, each the mean over the ranks; NaN if not known.

    They add up to the step. No two clocks are compared: after its push each rank waits, the last
    one only for the shards, so that a rank's excess over the shortest of these waits is what it
    waited for others.

    Attributes:
        compute: for the batch, the loss and its gradients.
        push: writing the gradients where the shards read them.
        wait: waiting for other ranks.
        apply: the shards' step: the slowest shard's mean over the steps since it was last asked.
        pull: the rest until the new parameters can be read: messages, and bytes between hosts.
    """

    compute: float
    push: float
    wait: float
    apply: float
    pull: float

    @property
    def total(self) -> float:
        """The step's seconds."""
        return sum(self)


UNKNOWN = Phases(*[math.nan] * 5)
"""Of a step whose end no rank has reported."""


class StepRecord(NamedTuple):
    """One step of a run.

    Attributes:
        step: counted from 1.
        loss: the mean over `ranks`; NaN if there are none.
        lr: the learning rate that it was applied with; NaN if nobody saw it.
        gradient_norm: the norm of the mean gradient before it was clipped; NaN if clipping did not
            need it, or nobody saw it.
        ranks: the ranks whose loss is known: all, unless the process of one died before it could
            report what it had pushed, or the run goes on without one.
        phases: where its time went.
        samples: in the batches of all ranks, as far as it is known.
    """

    step: int
    loss: float
    lr: float
    ranks: tuple[int, ...]
    phases: Phases = UNKNOWN
    samples: int = 0
    gradient_norm: float = math.nan

    @classmethod
    def of(cls, step: int, seen: Mapping[int, RankStep], apply_s: float = 0.0) -> "StepRecord":
        """Return the record of a step from what each rank saw of it.

        Args:
            step: counted from 1.
            seen: by rank.
            apply_s: seconds of the shards' step.
        """
        ranks = tuple(seen) if len(seen) == 1 else tuple(sorted(seen))
        count, samples, lr, shortest, norm = 0, 0, math.nan, math.inf, math.nan
        loss = compute = push = flight = 0.0
        for rank in ranks:  # in one pass: this is done for every step of a run
            its_loss, its_lr, its_compute, its_push, its_flight, its_samples, its_norm = seen[rank]
            loss += its_loss
            samples += its_samples
            if its_lr is not None:
                if not count:
                    lr = its_lr
                count += 1
                compute += its_compute
                push += its_push
                flight += its_flight
                if its_flight < shortest:
                    shortest = its_flight
            if its_norm is not None:
                norm = its_norm
        if not count:
            return cls(step, loss / len(ranks) if ranks else math.nan, lr, ranks)
        if apply_s > shortest:
            apply_s = shortest
        wait = flight / count - shortest
        times = (compute / count, push / count, wait, apply_s, shortest - apply_s)
        phases = _new(Phases, times)
        return _new(cls, (step, loss / len(ranks), lr, ranks, phases, samples, norm))


def in_words(numbers: Iterable[int]) -> str:
    """Return whole numbers in ascending order as runs, such as "0-3 6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
