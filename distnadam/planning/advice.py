"""Which number of shards, and which group of ranks, makes a step shortest."""

import dataclasses
from collections.abc import Iterator

from distnadam.planning.constants import Constants
from distnadam.planning.planned_run import PlannedRun
from distnadam.planning.step_time import StepTime, step_time

MOST_SHARDS_A_HOST = 4
_PAYS = 0.98
"""More shards, or a group, must make a step at least this much shorter to be advised."""


def best(
    run: PlannedRun, constants: Constants, *, views: bool = False
) -> tuple[PlannedRun, StepTime]:
    """Return the run with the best number of shards and the best group, and its step.

    Fewer shards and smaller groups win where they are as good: fewer processes, and the bits of a
    group of 1 are those of any run.
    """
    chosen, found = run, step_time(run, constants, views=views)
    for other in _choices(run):
        tried = step_time(other, constants, views=views)
        if tried.seconds < found.seconds * _PAYS:
            chosen, found = other, tried
    return chosen, found


def _choices(run: PlannedRun) -> Iterator[PlannedRun]:
    for each_host in range(1, MOST_SHARDS_A_HOST + 1):
        for group in range(1, run.workers_per_host + 1):
            if run.workers_per_host % group == 0:
                shards = each_host * run.num_shard_hosts
                yield dataclasses.replace(run, shards=shards, sum_group=group)
