"""The bytes that a round moves over each host's cable, in each direction."""

from dataclasses import dataclass

from distnadam.planning.planned_run import FLOAT32_BYTES, PlannedRun


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The bytes of one phase at the host that moves most.

    Attributes:
        sent: bytes that leave the host.
        received: bytes that come to it.
        in_all: bytes that leave all hosts together.
    """

    sent: float
    received: float
    in_all: float

    @property
    def most(self) -> float:
        """The larger direction; a cable carries both at once."""
        return max(self.sent, self.received)


def gradients(run: PlannedRun) -> Traffic:
    """Return what a push moves: each host's gradients, but for the shards that it has itself."""
    whole = float(run.gradient_bytes * run.parameters * run.pushes_of_a_host)
    if run.shard_hosts:
        received = whole * run.hosts * run.held
        return Traffic(sent=max(whole, 0.0), received=received, in_all=whole * run.hosts)
    elsewhere = whole * (1 - 1 / run.num_shard_hosts)
    received = whole * run.held * (run.hosts - 1)
    return Traffic(sent=elsewhere, received=received, in_all=elsewhere * run.hosts)


def parameters(run: PlannedRun) -> Traffic:
    """Return what a pull moves: the parameters, once to each host that has workers."""
    whole = float(run.parameter_bytes * run.parameters)
    if run.shard_hosts:
        sent = whole * run.held * run.hosts
        return Traffic(sent=sent, received=whole, in_all=whole * run.hosts)
    elsewhere = whole * (1 - 1 / run.num_shard_hosts)
    sent = whole * run.held * (run.hosts - 1)
    return Traffic(sent=sent, received=elsewhere, in_all=elsewhere * run.hosts)


def replication(run: PlannedRun) -> Traffic:
    """Return what goes to standbys of other hosts: each shard's mean gradient."""
    if not run.replicas or run.num_shard_hosts < 2:
        return Traffic(sent=0.0, received=0.0, in_all=0.0)
    mean = float(FLOAT32_BYTES * run.parameters)
    return Traffic(sent=mean * run.held, received=mean * run.held, in_all=mean)
