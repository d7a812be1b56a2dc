"""Many rounds of a large run, with what a plan's formula leaves out: stragglers, racks whose uplink
is shared, and hosts that are lost.

It uses the formulas of `step_time` and `peers`; random numbers come from one seed, so that a
simulation can be repeated.
"""

from dataclasses import dataclass

import numpy as np

from distnadam.planning import traffic
from distnadam.planning.constants import Constants
from distnadam.planning.peers import ring_all_reduce_s, single_server_s
from distnadam.planning.planned_run import PlannedRun
from distnadam.planning.step_time import step_time

ROUNDS = 2000
MEANS = ("distnadam", "ring all-reduce", "one server")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What happens to a run.

    Args:
        gradient_s: seconds in which a worker computes its gradient, at the median.
        spread: of that time's logarithm from worker to worker and round to round.
        rack_hosts: hosts in one rack; 0: all are in one.
        rack_link_bytes_per_s: of a rack's uplink, in each direction.
        host_lost_every_s: seconds of work between two losses of a host; 0: none is lost.
        recovery_s: seconds that a loss costs here: a standby steps in, a worker is started anew.
        restart_s: seconds that a loss costs all-reduce: all processes are started anew, and go back
            to the last checkpoint.
    """

    gradient_s: float = 0.1
    spread: float = 0.1
    rack_hosts: int = 0
    rack_link_bytes_per_s: float = 5e9
    host_lost_every_s: float = 0.0
    recovery_s: float = 5.0
    restart_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What was found for one means.

    Attributes:
        name: of the means.
        round_s: seconds of a round at the mean, with what losses cost.
        samples_per_s: gradients that were counted in a second.
    """

    name: str
    round_s: float
    samples_per_s: float


def simulate(
    run: PlannedRun, constants: Constants, around: Surroundings, *, seed: int = 0
) -> list[Simulated]:
    """Return what a run, and its peers, make of `ROUNDS` rounds."""
    rng = np.random.default_rng(seed)
    slowest = around.gradient_s * np.exp(
        around.spread * rng.standard_normal((ROUNDS, run.workers)).max(axis=1)
    )
    steps = {
        "distnadam": max(step_time(run, constants).seconds, _racks_s(run, around)),
        "ring all-reduce": max(ring_all_reduce_s(run, constants), _ring_racks_s(run, around)),
        "one server": single_server_s(run, constants),
    }
    found = []
    for name in MEANS:
        rounds = slowest + steps[name]
        round_s = float(rounds.mean())
        if around.host_lost_every_s:
            loss_s = around.recovery_s if name == "distnadam" else around.restart_s
            round_s *= 1 + loss_s / around.host_lost_every_s
        found.append(Simulated(name=name, round_s=round_s, samples_per_s=run.workers / round_s))
    return found


def _racks_s(run: PlannedRun, around: Surroundings) -> float:
    """Return the seconds for which a rack's uplink is busy: what goes to shards in other racks."""
    racks = _racks(run, around)
    if racks < 2:
        return 0.0
    crossing = (racks - 1) / racks
    moved = traffic.gradients(run).in_all + traffic.parameters(run).in_all
    return moved * crossing / racks / around.rack_link_bytes_per_s


def _ring_racks_s(run: PlannedRun, around: Surroundings) -> float:
    """Return the same for a ring in the order of racks, of which one edge crosses each uplink."""
    if _racks(run, around) < 2:
        return 0.0
    moved = 2 * (run.hosts - 1) / run.hosts * run.gradient_bytes * run.parameters
    return moved / around.rack_link_bytes_per_s


def _racks(run: PlannedRun, around: Surroundings) -> int:
    return -(-run.hosts // around.rack_hosts) if around.rack_hosts else 1
