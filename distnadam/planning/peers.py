"""How long the same step takes by other means, by their textbook formulas: ring all-reduce, and one
server for all.

Both move what they must at the cable's whole speed, and step as fast as ours, which flatters them.
"""

from distnadam.planning.constants import Constants
from distnadam.planning.planned_run import FLOAT32_BYTES, PlannedRun
from distnadam.planning.step_time import STEP_BYTES

_MESSAGES = 4
"""One-way messages of a round of ours, of which a turn of the ring is one."""


def ring_all_reduce_s(run: PlannedRun, constants: Constants) -> float:
    """Return the seconds of a ring of all hosts, whose own workers are summed before.

    Each host sends 2 (H - 1) / H of the gradient, in 2 (H - 1) turns, and each worker steps the
    whole model; the formula is that of Patarasuk and Yuan, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations" (2009).
    """
    hosts, each = run.hosts, run.workers_per_host
    summed = FLOAT32_BYTES * run.parameters * (each + 1) / min(each, constants.cores)
    moved = 2 * (hosts - 1) / hosts * run.gradient_bytes * run.parameters
    stepped = (STEP_BYTES + FLOAT32_BYTES) * run.parameters * max(1.0, each / constants.cores)
    turns = max(1, 2 * (hosts - 1)) * constants.turn_s / _MESSAGES
    return (
        (summed / constants.copy_bytes_per_s if each > 1 else 0.0)
        + moved / constants.link_bytes_per_s
        + stepped / constants.step_bytes_per_s
        + turns
    )


def single_server_s(run: PlannedRun, constants: Constants) -> float:
    """Return the seconds of one server on a host of its own, to which every worker sends all."""
    there = run.gradient_bytes * run.parameters * run.workers
    back = run.parameter_bytes * run.parameters * run.workers
    stepped = (STEP_BYTES + FLOAT32_BYTES * run.workers) * run.parameters
    moved = (there + back) / constants.link_bytes_per_s
    return moved + stepped / constants.step_bytes_per_s / constants.cores + constants.turn_s
