"""Starts and fills standbys beside the watch, which must not wait for that, and reports back."""

import logging
import time
from collections.abc import Callable, Sequence

from distnadam.errors import DistNadamError
from distnadam.protocol.shard_status import ShardSpec
from distnadam.protocol.supervisor_messages import AttachStandby
from distnadam.supervision.cluster_state import ClusterState
from distnadam.supervision.events import StandbyFilled, StandbyStarted
from distnadam.supervision.process_manager import ShardProcess

log = logging.getLogger("distnadam")

FILL_S = 3600.0
_START_AGAIN_S = 1.0


class StandbyStarter:
    """Starts processes for standbys, and has shards fill them.

    Args:
        cluster: its processes start and reach them.
        report: takes `StandbyStarted` and `StandbyFilled`, from the calling thread.
    """

    def __init__(
        self,
        cluster: ClusterState,
        report: Callable[[StandbyStarted | StandbyFilled], None],
    ) -> None:
        self._cluster = cluster
        self._report = report

    def start(self, spec: ShardSpec, near: Sequence[ShardProcess]) -> None:
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

    def fill(self, layout_generation: int, primary: ShardProcess, standby: ShardProcess) -> None:
        """Have a shard copy its state to its standby; report how that ended."""
        index = primary.index
        attach = {index: AttachStandby(standby)}
        answer = self._cluster.processes.ask({index: primary}, attach, FILL_S).get(index)
        error = answer if isinstance(answer, Exception) else None
        self._report(
            StandbyFilled(layout_generation=layout_generation, standby=standby, error=error)
        )
