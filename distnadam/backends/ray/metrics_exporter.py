"""Shows what this process measures to whoever scrapes Ray's metrics: a thread of its own reads the
meter every few seconds.

Ray's metrics are on where a node's agent has a port for them, which it has where Ray was installed
with its extra `default`.
"""

import logging
import threading
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import ray
from ray.util import metrics as rays

from distnadam.config import Options
from distnadam.errors import ClusterError
from distnadam.metrics.meter import BOUNDS_S, Meter
from distnadam.metrics.table import METRICS

log = logging.getLogger("distnadam")

EVERY_S = 2.0
"""Seconds between two readings; Ray forgets a gauge that was not set for 20 s."""
ENOUGH = 50
"""Durations of one kind told at a time: each costs Ray microseconds, here and in its agent."""
_MIDDLES_S = [
    BOUNDS_S[0] / 2,
    *((low + high) / 2 for low, high in pairwise(BOUNDS_S)),
    2 * BOUNDS_S[-1],
]


class Exporter:
    """Exports one meter.

    Args:
        meter: what is measured here.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._metrics: dict[str, Any] = {}
        self._told: dict[tuple[str, ...], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, name: str | None, options: Options) -> "Exporter | None":
        """Begin to export for an optimizer where that is wanted and Ray's metrics are on in this
        process's node.
        """
        return cls(Meter(name)) if options.metrics and metrics_are_on() else None

    @staticmethod
    def check(options: Options) -> None:
        """Raise ClusterError where metrics are insisted on and Ray's are off here."""
        if options.metrics is True and not metrics_are_on():
            told = "Options(metrics=True): Ray's metrics are off on this process's node"
            raise ClusterError(
                f"{told}: pip install 'distnadam[metrics]' on every node and start Ray anew, or "
                "use metrics='auto'"
            )

    def finish(self) -> None:
        """Have the thread export what there is, and end."""
        self._stop.set()

    def close(self) -> None:
        """Export what there is, and no more from then on."""
        self.finish()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._export()
        self._export()

    def _export(self) -> None:
        if not ray.is_initialized():
            return
        try:
            for name, seconds in self.meter.seconds.items():
                for middle, count in zip(_MIDDLES_S, seconds.take(ENOUGH), strict=True):
                    for _ in range(count):
                        self._metric(name).observe(middle, {"optimizer": self.meter.optimizer})
            for name, tags, value in self.meter.samples():
                self._tell(name, {"optimizer": self.meter.optimizer, **tags}, value)
        except (
            Exception
        ):  # of Ray, or of a shard that is being closed: nothing here is worth a training
            log.debug("metrics", exc_info=True)

    def _tell(self, name: str, tags: Mapping[str, str], value: float) -> None:
        if METRICS[name].kind == "gauge":
            self._metric(name).set(value, tags)
            return
        key = (name, *tags.values())
        new, self._told[key] = value - self._told.get(key, 0.0), value
        if new > 0:
            self._metric(name).inc(new, tags)

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            metric = METRICS[name]
            if metric.kind == "histogram":
                self._metrics[name] = rays.Histogram(
                    name, metric.description, list(BOUNDS_S), metric.tag_keys
                )
            else:
                kind = rays.Counter if metric.kind == "counter" else rays.Gauge
                self._metrics[name] = kind(name, metric.description, metric.tag_keys)
        return self._metrics[name]


def metrics_are_on() -> bool:
    """Whether Ray exports the metrics of this process's node."""
    node = ray.get_runtime_context().get_node_id()
    return any(
        entry["NodeID"] == node and entry.get("MetricsExportPort", -1) > 0 for entry in ray.nodes()
    )
