"""Reports the steps of a segment to callbacks and the history."""

from collections.abc import Mapping

from distnadam.training.callbacks import CallbackList
from distnadam.training.history import History
from distnadam.training.steps import RankStep, StepRecord, in_words

SeenSteps = Mapping[int, Mapping[int, RankStep]]
"""What each rank saw of each step: by step, from 0, then by rank."""


def report_steps(
    callbacks: CallbackList,
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
    history.step_seconds += seconds
    records = [StepRecord.of(step + 1, seen.get(step, {}), apply_s) for step in steps]
    callbacks.report(tuple(records))  # which no callback can change for the others


def report_incomplete(
    callbacks: CallbackList, seen: SeenSteps, steps: range, num_ranks: int
) -> None:
    """Say of which steps the loss is not the mean over all ranks, after a recovery."""
    missing = [step + 1 for step in steps if len(seen.get(step, {})) < num_ranks]
    if missing:
        callbacks.on_message(
            f"steps {in_words(missing)}: the loss is the mean over the ranks that metrics.csv "
            "names: a process died before it could report its own"
        )
