"""The plan of one run of `fit`: its steps, when it saves and evaluates, and which checkpoints stay.

What `distnadam plan` computes is in `planning`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay; see `fit`."""

    last: int
    every: int | None
    every_s: float | None


@dataclass(frozen=True)
class RunPlan:
    """How many steps a run has, of how many micro-batches each is, when it saves and evaluates, and
    which checkpoints it keeps.
    """

    steps: int
    save_every: int | None
    evaluate_every: int | None
    keep: RetentionPolicy
    accumulate: int = 1

    def boundary_after(self, step: int) -> int:
        """Return the next step at which something is due."""
        due = [
            step + every - step % every
            for every in (self.save_every, self.evaluate_every)
            if every is not None
        ]
        return min([self.steps, *due])

    @property
    def most_checkpoints(self) -> int:
        """How many there are at one time at most: the last are kept while one more is written."""
        saved = -(-self.steps // (self.save_every or self.steps))
        kept = self.steps // self.keep.every if self.keep.every else 0
        return min(saved, self.keep.last + 1 + kept)

    def due(self, every: int | None, step: int) -> bool:
        """Whether what is due every `every` steps, and at the end, is due after this step."""
        return step == self.steps or (every is not None and step % every == 0)
