"""Reports the steps of a segment to callbacks and the history."""

from collections.abc import Mapping

from distnadam.shield import shield
from distnadam.training.callbacks import Callback
from distnadam.training.history import History
from distnadam.training.steps import RankStep, StepRecord

SeenSteps = Mapping[int, Mapping[int, RankStep]]
"""What each rank saw of each step: by step, from 0, then by rank."""


def report_steps(
    callbacks: Callback,
    history: History,
    seen: SeenSteps,
    steps: range,
    seconds: float,
    apply_s: float,
) -> None:
    """Report steps; others that were seen were reported before shards went back.

    Args:
        callbacks: get each of them.
        history: gets their seconds.
        seen: may lack some.
        steps: counted from 0.
        seconds: of all of them.
        apply_s: of the shards' step, as they measure it.
    """
    for step in steps:
        record = StepRecord.of(step + 1, seen.get(step, {}), apply_s)
        callbacks.run.step = record.step
        history.step_seconds += seconds / len(steps)
        with shield:  # no row is lost to a Ctrl-C
            callbacks.on_record(record)
        callbacks.on_step(record.step, record.loss)


def incomplete(seen: SeenSteps, steps: range, num_ranks: int) -> list[int]:
    """Return the steps, counted from 1, that not every rank has reported."""
    return [step + 1 for step in steps if len(seen.get(step, {})) < num_ranks]
