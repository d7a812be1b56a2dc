"""Starts and fills standbys beside the watch, which must not wait for that, and reports back; and
ends them.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

from distnadam.errors import DistNadamError
from distnadam.protocol.messages import ShardSpec
from distnadam.protocol.supervisor_messages import AttachStandby
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.events import StandbyFilled, StandbyStarted
from distnadam.supervision.process_manager import ShardProcess

log = logging.getLogger("distnadam")

FILL_S = 3600.0
_START_AGAIN_S = 1.0


class StandbyStarter:
    """Starts processes for standbys, has shards fill them, and ends them.

    Args:
        cluster: its processes start and reach them.
        report: takes `StandbyStarted` and `StandbyFilled`, from the executor's thread.
        beside: runs what must not hold up the supervisor.
    """

    def __init__(
        self,
        cluster: ClusterState,
        report: Callable[[StandbyStarted | StandbyFilled], None],
        beside: Executor,
    ) -> None:
        self._cluster = cluster
        self._report = report
        self._beside = beside

    def start(self, shards: Sequence[int]) -> None:
        """Start a process for a standby of each of these shards."""
        cluster = self._cluster
        for index in shards:
            cluster.filling.add(index)
            near = list(cluster.alive().values())
            self._beside.submit(self._start, cluster.specs[index], near)

    def fill(self, shards: Sequence[int]) -> None:
        """Have these shards copy their state to their standbys, or to these's successors."""
        cluster = self._cluster
        for index in shards:
            cluster.filling.add(index)
            standby = cluster.successors.get(index) or cluster.standbys[index]
            self._beside.submit(
                self._fill, cluster.layout_generation, cluster.shards[index], standby
            )

    def drop(self, known: Mapping[int, ShardProcess], shards: Sequence[int]) -> None:
        """End those of these standbys, or successors, that are of these shards."""
        dropped = [known[index] for index in shards if index in known]
        for standby in dropped:
            self._cluster.drop_standby(standby)
        self._cluster.processes.terminate(*dropped)

    def _start(self, spec: ShardSpec, near: Sequence[ShardProcess]) -> None:
        """Start a process for a shard's standby, near these; report it, or None."""
        process = None
        try:
            process = self._cluster.processes.start(spec, standby=True, near=near)
        except Exception as error:  # unreported, the shard would count as filling for ever
            log.warning(
                "no standby for shard %d can be started: %s",
                spec.index,
                error,
                exc_info=not isinstance(error, DistNadamError),
            )
            time.sleep(_START_AGAIN_S)
        self._report(
            StandbyStarted(
                layout_generation=spec.layout_generation, index=spec.index, process=process
            )
        )

    def _fill(self, layout_generation: int, primary: ShardProcess, standby: ShardProcess) -> None:
        """Have a shard copy its state to its standby; report how that ended."""
        index = primary.index
        attach = {index: AttachStandby(standby)}
        answer = self._cluster.processes.ask({index: primary}, attach, FILL_S).get(index)
        error = answer if isinstance(answer, Exception) else None
        self._report(
            StandbyFilled(layout_generation=layout_generation, standby=standby, error=error)
        )
