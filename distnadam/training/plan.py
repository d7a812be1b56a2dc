"""What a run of `fit` is to do, and at which steps: to its end, saving and evaluating on the way. Data only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay, as `fit` has it."""

    last: int
    every: int | None
    every_s: float | None


@dataclass(frozen=True)
class Plan:
    """The steps in all, and those between two saves and two evaluations; whether to resume, and what to keep."""

    steps: int
    save_every: int | None
    evaluate_every: int | None
    resume: str
    keep: Keep

    def boundary_after(self, step: int) -> int:
        """Return the next step at which something is due."""
        due = [step + every - step % every for every in (self.save_every, self.evaluate_every) if every is not None]
        return min([self.steps, *due])

    def due(self, every: int | None, step: int) -> bool:
        """Whether what is done every so many steps, and at the end, is to be done after this one."""
        return step == self.steps or (every is not None and step % every == 0)
