"""How long a synchronous step takes, phase by phase, and what bounds each.

A step is `fill` (workers copy their gradients into memory that shards or the relay read), `sum` (a
group's gradients become one), `push`, `apply`, `replicate` (standbys get what they follow by),
`pull`, and `turn` (what a round costs however small the model is). A phase takes as long as the
busiest cable, or the busiest host's cores, whichever is longer.
"""

from dataclasses import dataclass

from distnadam.planning import traffic
from distnadam.planning.constants import Constants
from distnadam.planning.planned_run import FLOAT32_BYTES, PlannedRun
from distnadam.planning.traffic import Traffic

STEP_BYTES = 24
"""Bytes of memory that a step moves for each parameter, beside its gradients."""
_MEASURED_PROCESSES = 2
"""A worker and a shard on each host, by which `Constants.turn_s` was measured."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a step.

    Attributes:
        name: of the phase.
        seconds: that it takes.
        bound: what it waits for: "cable", "cores" or "delay".
    """

    name: str
    seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step, without the computation of gradients.

    Attributes:
        phases: in their order.
    """

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def longest(self) -> Phase:
        """The phase that takes longest."""
        return max(self.phases, key=lambda phase: phase.seconds)


def step_time(run: PlannedRun, constants: Constants, *, views: bool = False) -> StepTime:
    """Return how long a step of a run takes.

    Args:
        run: what is planned.
        constants: of its hosts and cables.
        views: whether workers write gradients where they are needed and read parameters in place.
    """
    params = run.parameters
    copies = 0 if views else 2 * FLOAT32_BYTES * params * run.workers_per_host
    sums = 0
    if run.sum_group > 1:
        sums = FLOAT32_BYTES * params * (run.workers_per_host + run.pushes_of_a_host)
    gathered = run.held * params * (STEP_BYTES + FLOAT32_BYTES * run.sources)
    sent, back = traffic.gradients(run), traffic.parameters(run)
    fed = traffic.replication(run)
    cores = constants.cores
    workers_cores = min(cores, run.workers_per_host)
    shards_cores = min(cores, run.shards_of_a_host)
    crowded = max(1.0, _processes(run) / max(_MEASURED_PROCESSES, cores))
    return StepTime(
        phases=(
            _cores("fill", copies / constants.copy_bytes_per_s / workers_cores),
            _cores("sum", sums / constants.copy_bytes_per_s),
            _moved("push", sent, constants),
            _cores("apply", gathered / constants.step_bytes_per_s / shards_cores),
            _moved("replicate", fed, constants),
            _moved("pull", back, constants),
            Phase(name="turn", seconds=constants.turn_s * crowded, bound="delay"),
        )
    )


def _processes(run: PlannedRun) -> int:
    """Return the processes that a round wakes on the busiest host: workers, shards, standbys."""
    beside = 0 if run.shard_hosts else run.shards_of_a_host * (1 + run.replicas)
    return run.workers_per_host + beside


def _cores(name: str, seconds: float) -> Phase:
    return Phase(name=name, seconds=seconds, bound="cores")


def _moved(name: str, moved: Traffic, constants: Constants) -> Phase:
    cable = moved.most / constants.link_bytes_per_s
    computed = (moved.sent + moved.received) / constants.socket_bytes_per_s
    cores = computed / min(constants.cores, 2.0)  # one process sends, another receives
    bound = "cable" if cable >= cores else "cores"
    return Phase(name=name, seconds=max(cable, cores), bound=bound)
