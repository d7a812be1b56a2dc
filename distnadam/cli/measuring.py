"""Measures the constants of a plan on the hosts at hand, for `doctor --measure --save`."""

import statistics
import time

import numpy as np

from distnadam.backends import factory
from distnadam.config import Options
from distnadam.errors import DistNadamError
from distnadam.optimizer import DistNadam
from distnadam.planning.constants import Constants

_ELEMENTS_A_HOST = 1024
_ROUNDS = 200
_WAIT_S = 60.0
_WITHIN_A_HOST = 1e12
"""Bytes per second of the cable that a single host does not have."""


class _Rounds:
    """A rank that steps a few parameters.

    Args:
        rank: its rank.
        optimizer: its optimizer.
    """

    def __init__(self, rank: int, optimizer: DistNadam) -> None:
        self._worker = optimizer.worker(rank)

    def median_s(self, size: int) -> float:
        """Step `_ROUNDS` times, and return the median."""
        gradients = {"w": np.ones(size, np.float32)}
        self._worker.pull()
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            self._worker.step(gradients)
            times.append(time.perf_counter() - began)
        self._worker.close()
        return statistics.median(times)


def measure_constants(ports: tuple[int, int] | None) -> Constants:
    """Measure all hosts of this process's Ray, or of RAY_ADDRESS, at once.

    The slowest counts: a round waits for all.

    Raises:
        ClusterError: there is no Ray, or a host did not answer.
    """
    speeds, links = factory.measure_hosts(ports)
    sent = [min(link.sent_bytes_per_s, link.received_bytes_per_s) for link in links]
    return Constants(
        cores=min(each.cores for each in speeds),
        copy_bytes_per_s=min(each.copy_bytes_per_s for each in speeds),
        step_bytes_per_s=min(each.step_bytes_per_s for each in speeds),
        socket_bytes_per_s=min(each.socket_bytes_per_s for each in speeds),
        turn_s=_turn_s(len(speeds), ports),
        link_bytes_per_s=min(sent, default=_WITHIN_A_HOST),
    )


def _turn_s(hosts: int, ports: tuple[int, int] | None) -> float:
    """Return the seconds of a round of a few parameters, a worker and a shard on each host."""
    size = _ELEMENTS_A_HOST * hosts
    options = Options(port_range=ports)
    with DistNadam(num_shards=hosts, num_workers=hosts, backend="ray", options=options) as few:
        team = few.build({"w": np.zeros(size, np.float32)}).team(_Rounds, few)
        try:
            for rank in range(hosts):
                team.call(rank, "median_s", size)
            found: list[float] = []
            deadline = time.monotonic() + _WAIT_S
            while len(found) < hosts and time.monotonic() < deadline:
                for _, result in team.results(1.0):
                    if isinstance(result, Exception):
                        raise result
                    found.append(result)
        finally:
            team.close()
    if len(found) < hosts:
        raise DistNadamError(f"{_ROUNDS} rounds of {size} parameters took over {_WAIT_S:g} s")
    return max(found)
