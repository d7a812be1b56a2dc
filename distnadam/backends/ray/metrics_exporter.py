"""Exports what this process measures as Ray's metrics: a thread reads the meter every few seconds.

Ray's metrics are on if a node's agent has a port for them, which needs Ray's extra `default`. What
is measured is known to `metrics`, not here.
"""

import logging
import threading
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from distnadam.backends.ray.joined import has_ray
from distnadam.config import Options
from distnadam.errors import ClusterError
from distnadam.extras import how_to_install
from distnadam.metrics.meter import BOUNDS_S, Meter
from distnadam.metrics.table import METRICS

log = logging.getLogger("distnadam")

EVERY_S = 2.0
"""Seconds between two exports; Ray forgets a gauge that was not set for 20 s."""
MOST_DURATIONS = 50
"""Durations of one kind exported at a time: each costs Ray microseconds, here and in its agent."""
_MIDDLES_S = [
    BOUNDS_S[0] / 2,
    *((low + high) / 2 for low, high in pairwise(BOUNDS_S)),
    2 * BOUNDS_S[-1],
]


class Exporter:
    """Exports one meter, from its construction until `close`.

    Args:
        meter: what is measured here.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._metrics: dict[str, Any] = {}
        self._exported: dict[tuple[str, ...], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, name: str | None, options: Options) -> "Exporter | None":
        """Return an exporter for the optimizer of that name, or None if metrics are off here."""
        return cls(Meter(name)) if options.metrics and metrics_are_on() else None

    @staticmethod
    def check(options: Options) -> None:
        """Raise ClusterError if metrics are required and Ray's are off on this node."""
        if options.metrics is True and not metrics_are_on():
            raise ClusterError(
                "Options(metrics=True): Ray's metrics are off on this process's node: "
                f"{how_to_install('metrics')} on every node and start Ray again, or use "
                "metrics='auto'"
            )

    def finish(self) -> None:
        """Have the thread export once more and end; does not wait."""
        self._stop.set()

    def close(self) -> None:
        """Export once more, and no more from then on."""
        self.finish()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._export()
        self._export()

    def _export(self) -> None:
        if not has_ray():
            return
        try:
            for name, seconds in self.meter.seconds.items():
                for middle, count in zip(_MIDDLES_S, seconds.take(MOST_DURATIONS), strict=True):
                    for _ in range(count):
                        self._metric(name).observe(middle, {"optimizer": self.meter.optimizer})
            for name, tags, value in self.meter.samples():
                self._set(name, {"optimizer": self.meter.optimizer, **tags}, value)
        except Exception:  # of Ray, or of a shard that is being closed: metrics end no training
            log.debug("metrics", exc_info=True)

    def _set(self, name: str, tags: Mapping[str, str], value: float) -> None:
        if METRICS[name].kind == "gauge":
            self._metric(name).set(value, tags)
            return
        key = (name, *tags.values())
        new = value - self._exported.get(key, 0.0)
        self._exported[key] = value
        if new > 0:
            self._metric(name).inc(new, tags)

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            metric = METRICS[name]
            if metric.kind == "histogram":
                self._metrics[name] = ray_metrics.Histogram(
                    name, metric.description, list(BOUNDS_S), metric.tag_keys
                )
            else:
                kind = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
                self._metrics[name] = kind(name, metric.description, metric.tag_keys)
        return self._metrics[name]


def metrics_are_on() -> bool:
    """Return whether Ray exports the metrics of this process's node."""
    node = ray.get_runtime_context().get_node_id()
    return any(
        entry["NodeID"] == node and entry.get("MetricsExportPort", -1) > 0 for entry in ray.nodes()
    )
